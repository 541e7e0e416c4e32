"""Reconstruction block by block: the numbers of passes of the whole network, with less of it in memory."""

import contextlib
import itertools
from collections import Counter
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.helpers.reconstruction import (
    ROUNDING,
    Interruption,
    MemoryCheckpointer,
    RecordedProgress,
    compute,
    config,
)
from tests.helpers.tiny_transformers import TINY, on_meta_device, quantized, structure, write_shards
from tfmq_exp.calibration.timesteps import EveryKth
from tfmq_exp.denoisers.loading.meta_network import on_meta, skeleton
from tfmq_exp.denoisers.loading.sharded_weights import ShardedWeights
from tfmq_exp.denoisers.read_structure import read_structure
from tfmq_exp.methods.activations import CalibrateRanges, LearnRanges
from tfmq_exp.methods.weights import Reconstruct, RoundToNearest
from tfmq_exp.pipeline.unit_checkpoints import CheckpointedIntegers, FileUnitCheckpointer
from tfmq_exp.quant.layers import QuantizedWeight
from tfmq_exp.reconstruction.blocks.block_by_block import reconstruct_units
from tfmq_exp.reconstruction.blocks.chain import read_segments
from tfmq_exp.reconstruction.blocks.stored_weights import StoredWeights
from tfmq_exp.reconstruction.context import ReconstructionContext
from tfmq_exp.reconstruction.loop import reconstruct
from tfmq_exp.reconstruction.module import ReconstructionConfig
from tfmq_exp.reconstruction.objectives import Fisher, Lp
from tfmq_exp.reconstruction.units import (
    Blockwise,
    FloatInputs,
    MixedInputs,
    Partition,
    QuantizedInputs,
    TemporalAware,
    TemporalFrozen,
    UnitInputs,
)

pytestmark = pytest.mark.filterwarnings("ignore::Warning:pytorch_lightning")
Integers = dict[str, tuple[QuantizedWeight, ...]]
BLOCKS = {name: [f"transformer_blocks.{i}" for i in range(3)] for name in ("dit", "pixart", "sd3")}
DOUBLE, SINGLE = ([f"{kind}transformer_blocks.{i}" for i in range(2)] for kind in ("", "single_"))


@cache
def network(name: str) -> nn.Module:
    return TINY[name].build()


def recipe(inputs: UnitInputs = QuantizedInputs(), iterations: int = 4) -> ReconstructionConfig:  # noqa: B008
    return config(iterations, rate=None, rounding=ROUNDING, objective=Lp(2.0), inputs=inputs)


def phase(name: str, unet: nn.Module, shelf: Any, cache_bytes: int = 2**30, **given: Any) -> ReconstructionContext:
    """A context of the network, which may be on the meta device."""
    data = TINY[name].calibration(network(name))
    parts, activation = structure(network(name), data), given.pop("activation", None)
    model, progress = quantized(unet, parts, activation=activation), given.pop("progress", RecordedProgress())
    return ReconstructionContext(model, unet, parts, data, compute(cache_bytes), 0, shelf, progress, **given)


def learned(name: str, how: Callable[..., None], learning: ReconstructionConfig, cache_bytes: int = 2**30) -> Any:
    """Model and reports of a whole reconstruction."""
    shelf = MemoryCheckpointer()
    context = phase(name, network(name), shelf, cache_bytes)
    how(context, TemporalAware()(context.structure, frozenset(context.model.weight_layers())), learning)
    return context.model.integers, {
        unit: (report.error_before, report.error_after) for unit, report in shelf.reports.items()
    }


def same(one: Integers, other: Integers) -> bool:
    return one.keys() == other.keys() and all(
        torch.equal(a.codes, b.codes) and torch.equal(a.dequantize(), b.dequantize())
        for layer in one
        for a, b in zip(one[layer], other[layer], strict=True)
    )


@pytest.mark.parametrize(
    ("name", "chains"),
    [*((name, [blocks]) for name, blocks in BLOCKS.items()), ("flux", [DOUBLE + SINGLE]), ("flux2", [DOUBLE, SINGLE])],
)
@pytest.mark.parametrize("on_meta_alone", [False, True])
def test_chains_are_as_published(name: str, chains: list[list[str]], on_meta_alone: bool) -> None:
    data = TINY[name].calibration(network(name))
    parts = structure(network(name), data)
    units = Blockwise()(parts, frozenset(parts.layers))
    segments = read_segments(skeleton(network(name)) if on_meta_alone else network(name), units, data)
    assert [unit for segment in segments for unit in segment.units] == units
    assert [[unit.name for unit in segment.units] for segment in segments if len(segment.links) > 1] == chains


NAMED = {"ids": lambda x: type(x).__name__ if not isinstance(x, str) else x}


def some(*quick: tuple[str, Any], of: tuple[list[str], list[Any]]) -> list[Any]:
    """All pairs; those that are not among the quick ones run with `-m every_family`."""
    return [
        pytest.param(name, x, marks=() if (name, type(x)) in quick else pytest.mark.every_family)
        for name, x in itertools.product(*of)
    ]


@pytest.mark.parametrize(
    ("name", "inputs"),
    some(
        *(("dit", QuantizedInputs), ("sd3", FloatInputs), ("flux2", MixedInputs)),
        of=(["dit", "flux", "sd3", "flux2"], [QuantizedInputs(), MixedInputs(), FloatInputs()]),
    ),
    **NAMED,
)
def test_numbers_are_those_of_passes_of_the_whole_network(name: str, inputs: UnitInputs) -> None:
    expected, errors = learned(name, reconstruct, recipe(inputs))
    found, own_errors = learned(name, reconstruct_units, recipe(inputs))
    assert same(found, expected)
    assert own_errors == errors
    assert not same(found, learned(name, reconstruct_units, recipe(inputs, 1))[0])  # iterations matter


def test_neither_matters_what_fits_into_memory() -> None:
    assert same(learned("sd3", reconstruct_units, recipe(), 20_000)[0], learned("sd3", reconstruct, recipe())[0])


def test_blocks_run_once_over_the_set_in_either_network() -> None:
    context, counts = phase("flux", network("flux"), MemoryCheckpointer()), Counter[str]()
    units = TemporalFrozen()(context.structure, frozenset(context.model.weight_layers()))
    blocks = {
        f"{kind}.{name}": net.get_submodule(f"{name}.attn")  # a skipped block's own hooks see it called
        for name in DOUBLE + SINGLE
        for kind, net in (("float", context.float_network), ("quantized", context.model.network))
    }
    hooks = [block.register_forward_hook(lambda *_, name=name: counts.update([name])) for name, block in blocks.items()]
    reconstruct_units(context, units, recipe(iterations=1))
    for hook in hooks:
        hook.remove()
    trace, batches, error, learning = 3, 2, 2, 1
    for name in DOUBLE + SINGLE:
        assert counts[f"float.{name}"] == trace + batches
        assert counts[f"quantized.{name}"] == error + learning + batches


class Stored:
    """A network on the meta device with its weights in files, and the checkpoints of a phase."""

    def __init__(self, name: str, folder: Path) -> None:
        self.name, self.network = name, on_meta_device(TINY[name])
        write_shards(network(name), folder)
        self.shards, self.folder = ShardedWeights.of(folder), folder / "units"

    def reconstruct(
        self, partition: Partition, learning: ReconstructionConfig, interrupt: int | None = None
    ) -> RecordedProgress:
        progress, shelf = RecordedProgress(interrupt), FileUnitCheckpointer(self.folder, {})
        stored = StoredWeights(self.shards, CheckpointedIntegers(self.folder))
        context = phase(self.name, self.network, shelf, progress=progress, stored=stored)
        with contextlib.suppress(Interruption):
            Reconstruct(partition, EveryKth(1), learning)(context)
        self.model = context.model
        return progress

    @property
    def integers(self) -> Integers:
        found = CheckpointedIntegers(self.folder)
        return found.read(found.layers())


@pytest.mark.parametrize(
    ("name", "partition"),
    some(
        *(("dit", TemporalAware), ("flux2", Blockwise)),
        of=(["dit", "pixart", "flux2"], [TemporalAware(), TemporalFrozen(), Blockwise()]),
    ),
    **NAMED,
)
def test_weights_are_loaded_block_by_block_and_a_killed_run_ends_with_the_same_bits(
    name: str, partition: Partition, tmp_path: Path
) -> None:
    context = phase(name, network(name), MemoryCheckpointer())
    Reconstruct(partition, EveryKth(1), recipe())(context)
    stored = Stored(name, tmp_path)
    first = stored.reconstruct(partition, recipe(), interrupt=4)
    second = stored.reconstruct(partition, recipe())
    assert second.restored == first.new
    assert len(first.new) == 4
    assert second.new
    layers = {
        layer for unit in partition(context.structure, frozenset(context.structure.layers)) for layer in unit.layers
    }
    assert same(stored.integers, {layer: parts for layer, parts in context.model.integers.items() if layer in layers})
    for unet in (stored.network, stored.model.network):
        weights = [parameter for key, parameter in unet.named_parameters() if "quantizer" not in key]
        assert all(weight.is_meta for weight in weights)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in stored.network.modules())


def test_tensors_of_blocks_are_read_once(tmp_path: Path) -> None:
    stored = Stored("pixart", tmp_path)
    stored.reconstruct(TemporalAware(), recipe(iterations=1))
    inside = {key: count for key, count in stored.shards.reads.items() if key.startswith("transformer_blocks.")}
    # scale_shift_table belongs to a block itself, and is read with what the pass to the last layer needs
    assert {count for key, count in inside.items() if "scale_shift_table" not in key} == {1}
    segments = 4  # stem, text, blocks, head: a pass to each; and the unit's own loading
    assert max(stored.shards.reads.values()) <= segments + 2
    assert set(stored.shards.reads) == set(stored.shards.files)


def test_structure_is_read_without_weights() -> None:
    data = TINY["dit"].calibration(network("dit"))
    outline = skeleton(on_meta_device(TINY["dit"]))
    assert read_structure(outline, on_meta(data[slice(0, 1)].inputs(torch.device("cpu")))) == structure(
        network("dit"), data
    )


@pytest.mark.parametrize(("name", "learn"), [("dit", False), ("pixart", True)])
def test_ranges_are_those_that_the_whole_network_observes(name: str, learn: bool, tmp_path: Path) -> None:
    stored, observe = Stored(name, tmp_path), CalibrateRanges(16, EveryKth(1))
    stored.reconstruct(TemporalFrozen(), recipe(iterations=1))
    method = LearnRanges(observe, Blockwise(), EveryKth(1), config(2, inputs=QuantizedInputs())) if learn else observe
    sources = StoredWeights(stored.shards, CheckpointedIntegers(stored.folder))
    found = phase(name, stored.network, MemoryCheckpointer(), activation=8, stored=sources)
    method(found)
    expected = phase(name, network(name), MemoryCheckpointer(), activation=8)
    for layer, parts in stored.integers.items():
        expected.model.freeze(layer, parts)
    RoundToNearest()(expected)
    method(expected)
    states = found.model.activation_state(), expected.model.activation_state()
    assert states[0].keys() == states[1].keys()
    # DiT's last layer runs the first block's embedder once more, which the block alone does not
    once = {key for key in states[0] if not (name == "dit" and key.startswith("transformer_blocks.0.norm1.emb."))}
    assert all(torch.equal(states[0][key], states[1][key]) for key in once)


def test_gradients_of_a_network_that_is_not_in_memory_are_refused(tmp_path: Path) -> None:
    fisher = config(1, rate=None, rounding=ROUNDING, objective=Fisher(), inputs=QuantizedInputs())
    with pytest.raises(ValueError, match="needs the whole network's weights in memory"):
        Stored("dit", tmp_path).reconstruct(Blockwise(), fisher)

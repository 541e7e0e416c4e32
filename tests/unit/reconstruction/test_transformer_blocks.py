"""Blocks of transformers: what is captured of them runs again, alone, with the same bits."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from tests.helpers.transformers import NAMES, Stored, read_stored
from tfmq_exp.calibration.dataset import CalibrationSet
from tfmq_exp.denoisers.structure import Kind
from tfmq_exp.quant.timestep_context import TimestepContext
from tfmq_exp.reconstruction.activation_cache import Shared, SpillAllocator, TensorTree
from tfmq_exp.reconstruction.capture import Capture, UnitActivations, call_unit, run_unit, shared_inputs
from tfmq_exp.reconstruction.units import Blockwise, Unit

MEMORY = 2**30


def units_of(stored: Stored) -> list[Unit]:
    structure = stored.structure()
    return Blockwise()(structure, frozenset(structure.layers))


def captured(stored: Stored, data: CalibrationSet, batch: int, storage: SpillAllocator) -> dict[str, UnitActivations]:
    units = units_of(stored)
    shared = shared_inputs(stored.network, units, data)
    return Capture(data, batch, storage).activations(stored.network, units, shared, with_inputs=True)


def rows(tree: TensorTree, start: int, stop: int) -> Any:
    return tree.structure([x[start:stop] for x in tree.tensors])


def same(some: Any, others: Any) -> bool:
    pairs = zip(pytree.tree_leaves(some), pytree.tree_leaves(others), strict=True)
    return all(torch.equal(a, b) if isinstance(a, Tensor) else a == b for a, b in pairs)


def runs_alone(stored: Stored, data: CalibrationSet, batch: int, storage: SpillAllocator) -> int:
    """Run every block alone on what was captured, in the same batches; their number, and an error for other bits."""
    context = TimestepContext([float(t) for t in data.t.unique()])
    found = captured(stored, data, batch, storage)
    for name, (inputs, outputs, _) in found.items():
        module = stored.network.get_submodule(name)
        for start in range(0, len(data), batch):
            with torch.no_grad():
                again = call_unit(module, context, rows(inputs["float"], start, start + batch))
            assert same(again, rows(outputs, start, start + batch)), name
        returned = run_unit(module, context, inputs["float"], batch, SpillAllocator(MEMORY))
        assert same(returned.tensors, outputs.tensors), name
    return len(found)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("batch", [1, 2, 6])
def test_blocks_run_alone_with_the_same_bits(name: str, batch: int) -> None:
    stored = read_stored(name)
    assert runs_alone(stored, stored.calibration(seed=1), batch, SpillAllocator(MEMORY)) == len(units_of(stored))


@pytest.mark.parametrize("name", NAMES)
def test_blocks_run_from_files_beyond_the_memory(name: str, tmp_path: Path) -> None:
    storage, stored = SpillAllocator(0, tmp_path), read_stored(name)
    assert runs_alone(stored, stored.calibration(seed=1), 2, storage)
    assert storage.spilled > 0
    assert sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file()) == storage.spilled
    storage.clear()
    assert not list(tmp_path.rglob("*"))


@pytest.mark.parametrize("name", NAMES)
def test_one_sample_is_enough(name: str) -> None:
    stored = read_stored(name)
    assert runs_alone(stored, stored.calibration([1]), 1, SpillAllocator(MEMORY))


def with_masks(stored: Stored, lengths: tuple[int, ...]) -> CalibrationSet:
    """The recorded samples with texts of these lengths."""
    data = stored.calibration()
    name = next(name for name in data.conditions if "mask" in name)
    words = torch.arange(data.conditions[name].shape[1])
    mask = torch.stack([words < length for length in lengths]).to(data.conditions[name])
    return replace(data, conditions={**data.conditions, name: mask})


@pytest.mark.parametrize("name", ["pixart_sigma", "lumina2"])
def test_texts_of_two_lengths(name: str) -> None:
    stored = read_stored(name)
    data = with_masks(stored, (2, 5))
    assert runs_alone(stored, data, 2, SpillAllocator(MEMORY))
    one = captured(stored, with_masks(stored, (5, 5)), 2, SpillAllocator(MEMORY))
    two = captured(stored, data, 2, SpillAllocator(MEMORY))
    last = [unit.name for unit in units_of(stored) if unit.kind is Kind.TRANSFORMER][-1]
    assert not torch.equal(two[last].outputs.tensors[0][0], one[last].outputs.tensors[0][0])  # it reads fewer words
    torch.testing.assert_close(two[last].outputs.tensors[0][1], one[last].outputs.tensors[0][1], atol=1e-5, rtol=0)


def test_batches_that_are_padded_to_other_lengths_are_refused() -> None:
    stored = read_stored("lumina2")
    with pytest.raises(ValueError, match=r"\(21, 16\).* where those before had .*\(18, 16\).* texts of one length"):
        captured(stored, with_masks(stored, (2, 5)), 1, SpillAllocator(MEMORY))


def shared_tensors(tree: TensorTree) -> list[Tensor]:
    return [leaf.tensor for leaf in pytree.tree_leaves(tree.whole) if isinstance(leaf, Shared)]


@pytest.mark.parametrize(
    ("name", "block", "shapes"),
    [
        ("flux_dev", "transformer_blocks.0", [(21, 16), (21, 16)]),
        ("flux_dev", "single_transformer_blocks.1", [(21, 16), (21, 16)]),
        ("wan21", "blocks.0", [(1, 32, 1, 12), (1, 32, 1, 12)]),
        ("lumina2", "layers.0", []),  # every sample has its own
        ("sd35", "transformer_blocks.0", []),
    ],
)
@pytest.mark.parametrize("batch", [1, 2, 6])
def test_rotary_tables_are_stored_once(name: str, block: str, shapes: list[tuple[int, ...]], batch: int) -> None:
    stored = read_stored(name)
    tree = captured(stored, stored.calibration(seed=1), batch, SpillAllocator(MEMORY))[block].inputs["float"]
    assert [tuple(x.shape) for x in shared_tensors(tree)] == shapes
    assert all(len(x) == 6 for x in tree.tensors)


def test_what_a_block_does_not_return_stays_none() -> None:
    stored = read_stored("sd35")
    outputs = captured(stored, stored.calibration(seed=1), 2, SpillAllocator(MEMORY))["transformer_blocks.2"].outputs
    text, image = outputs.structure(outputs.tensors)
    assert text is None
    assert image.shape == (6, 16, 16)


@pytest.mark.parametrize("name", NAMES)
def test_gradients_of_outputs_that_nothing_reads_are_zero(name: str) -> None:
    stored = read_stored(name)
    units, data = units_of(stored), stored.calibration(seed=1)
    generator = torch.Generator().manual_seed(0)
    squared = Capture(data, 3, SpillAllocator(MEMORY)).squared_gradients(stored.network, units, generator)
    outputs = captured(stored, data, 3, SpillAllocator(MEMORY))
    assert squared.keys() == outputs.keys()
    unread = 0
    for unit, tree in squared.items():
        shapes = [x.shape for x in outputs[unit].outputs.tensors]
        assert [x.shape for x in tree.tensors] == shapes
        for value in tree.tensors:
            assert float(value.mean()) in (0.0, pytest.approx(1.0))
            unread += float(value.mean()) == 0.0
    assert unread == (name == "flux_dev")  # the words after the last block

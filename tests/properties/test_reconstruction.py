"""Learning the rounding of weights, one unit at a time."""

import contextlib
import dataclasses
from collections import Counter
from collections.abc import Collection

import pytest
import torch
from torch import Tensor, nn

from tests.conftest import calibrated, quantizable
from tests.helpers.calibration import calibration
from tests.helpers.reconstruction import (
    CPU,
    ROUNDING,
    Interruption,
    MemoryCheckpointer,
    RecordedProgress,
    config,
    context,
    structure,
)
from tfmq_exp.calibration.dataset import CalibrationSet
from tfmq_exp.calibration.timesteps import EveryKth
from tfmq_exp.methods.weights import Reconstruct, RoundToNearest
from tfmq_exp.reconstruction.cache_format import CacheFormat
from tfmq_exp.reconstruction.context import UnitReport, UnitResult
from tfmq_exp.reconstruction.loop import reconstruct
from tfmq_exp.reconstruction.module import ReconstructionConfig
from tfmq_exp.reconstruction.objectives import Lp
from tfmq_exp.reconstruction.units import QuantizedInputs, TemporalAware, TemporalFrozen
from tfmq_exp.surgery.quantized_network import QuantizedNetwork

pytestmark = pytest.mark.filterwarnings("ignore::Warning:pytorch_lightning")


TEMPORAL_UNIT = "temporal_information_block"
Run = tuple[QuantizedNetwork, "Snapshots", RecordedProgress]


class Snapshots(MemoryCheckpointer):
    """Keeps the model's parameters after each unit, too."""

    def __init__(self, model: QuantizedNetwork, results: dict[str, UnitResult] | None = None) -> None:
        super().__init__(results)
        self.model, self.snapshots = model, [parameters(model)]

    def put(self, unit: str, learned: UnitResult, report: UnitReport) -> None:
        super().put(unit, learned, report)
        self.snapshots.append(parameters(self.model))


class Runs(RecordedProgress):
    """Counts how often every layer computes something, in all and until its unit is finished."""

    def __init__(self, model: QuantizedNetwork) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()
        self.until: dict[str, Counter[str]] = {}
        for layer in model.weight_layers():
            # inside the layer: a layer that is a unit itself would also be seen by its own hooks when it is replayed
            model.layer(layer).input_quantizer.register_forward_hook(
                lambda *_, layer=layer: self.counts.update([layer])
            )

    def on_unit_end(self, unit: str, report: UnitReport | None) -> None:
        self.until[unit] = Counter(self.counts)
        super().on_unit_end(unit, report)

    def after(self, unit: str, layers: Collection[str]) -> set[int]:
        return {self.counts[layer] - self.until[unit][layer] for layer in layers}


def parameters(model: QuantizedNetwork) -> dict[str, Tensor]:
    named = model.network.named_parameters()
    return {name: parameter.detach().clone() for name, parameter in named if "quantizer" not in name}


def rounding_config(iterations: int, cache: CacheFormat = "float32") -> ReconstructionConfig:
    found = config(iterations, rate=None, rounding=ROUNDING, objective=Lp(2.0), inputs=QuantizedInputs())
    return dataclasses.replace(found, cache=cache)


def learned(
    network: nn.Module,
    iterations: int,
    *,
    cache_bytes: int = 2**30,
    results: dict[str, UnitResult] | None = None,
    log: RecordedProgress | None = None,
    model: QuantizedNetwork | None = None,
    cache: CacheFormat = "float32",
) -> Run:
    """A fresh model (or this one), reconstructed until the end or until the log interrupts."""
    model, log = model or quantizable(network, weight=3, activation=None), log or RecordedProgress()
    shelf, units = Snapshots(model, results), TemporalAware()(structure(network), frozenset(model.weight_layers()))
    with contextlib.suppress(Interruption):
        reconstruct(
            context(model, network, calibration(network), shelf, log, cache_bytes),
            units,
            rounding_config(iterations, cache),
        )
    return model, shelf, log


def same_integers(one: QuantizedNetwork, other: QuantizedNetwork) -> bool:
    return one.integers.keys() == other.integers.keys() and all(
        torch.equal(a.codes, b.codes) and torch.equal(a.dequantize(), b.dequantize())
        for layer in one.integers
        for a, b in zip(one.integers[layer], other.integers[layer], strict=True)
    )


def output_error(model: nn.Module, network: nn.Module, data: CalibrationSet) -> float:
    with torch.no_grad():
        return float((model(**data.inputs(CPU)).sample - network(**data.inputs(CPU)).sample).square().mean())


@pytest.fixture(scope="module")
def run(network: nn.Module) -> Run:
    """A whole reconstruction of each family, long enough to learn something."""
    return learned(network, 30)


def test_every_weight_becomes_integer(network: nn.Module, run: Run) -> None:
    model, shelf, log = run
    layers = set(structure(network).layers)
    assert set(model.integers) == layers
    assert log.expected == [len(shelf.results)] == [len(log.new)]
    assert set(log.iterations) == set(shelf.results)
    assert not model.weight_quantizers()
    for layer, (integers,) in model.integers.items():
        assert torch.equal(model.layer(layer).weight, integers.dequantize())
        # each weight went to one of the two points beside it
        exact = network.get_submodule(layer).weight.clamp(integers.dequantize().min(), integers.dequantize().max())
        assert ((integers.dequantize() - exact).abs() <= 1.001 * integers.qparams.scale).all()


def test_units_are_nearer_to_the_float_network_than_with_nearest_rounding(run: Run) -> None:
    reports = run[1].reports.values()
    better = [report.unit for report in reports if report.error_after < report.error_before]
    assert len(better) >= 0.8 * len(reports)
    assert all(report.error_after < 1.05 * report.error_before for report in reports)


def test_outputs_are_nearer_to_the_float_network_than_with_nearest_rounding(network: nn.Module, run: Run) -> None:
    nearest = calibrated(quantizable(network, weight=3, activation=None))
    for data in (calibration(network), calibration(network, seed=9)):
        assert output_error(run[0], network, data) < 0.9 * output_error(nearest, network, data)


def test_unit_changes_its_own_weights_only(network: nn.Module, run: Run) -> None:
    _, shelf, log = run
    for unit, before, after in zip(log.new, shelf.snapshots, shelf.snapshots[1:], strict=False):
        changed = {name for name, value in after.items() if not torch.equal(value, before[name])}
        assert changed == {f"{layer}.weight" for layer in shelf.results[unit].integers}
    assert len(shelf.snapshots) == 1 + len(shelf.results)
    assert not any(learned.activations for learned in shelf.results.values())


def test_temporal_unit_learns_the_temporal_layers_first_and_alone(network: nn.Module, run: Run) -> None:
    _, shelf, log = run
    parts = structure(network)
    assert log.new[0] == TEMPORAL_UNIT
    assert set(shelf.results[TEMPORAL_UNIT].integers) == set(parts.temporal_layers)
    others = [layer for unit, learned in shelf.results.items() if unit != TEMPORAL_UNIT for layer in learned.integers]
    assert not any("time" in layer for layer in others)


@pytest.fixture(scope="module")
def short(network: nn.Module) -> QuantizedNetwork:
    """A reconstruction of as few iterations as have a choice of batches."""
    return learned(network, 2)[0]


def test_interrupted_run_ends_as_the_uninterrupted_one(network: nn.Module, short: QuantizedNetwork) -> None:
    _, shelf, _ = learned(network, 2, log=RecordedProgress(2))
    assert len(shelf.results) == 2
    resumed, after, log = learned(network, 2, results=shelf.results)
    assert log.restored == list(shelf.results)
    assert len(after.reports) == len(log.new) == log.expected[0] - 2
    assert same_integers(resumed, short)


def test_size_of_the_cache_does_not_matter(network: nn.Module, short: QuantizedNetwork) -> None:
    assert same_integers(learned(network, 2, cache_bytes=20_000)[0], short)


@pytest.mark.parametrize("cache", ["int8", "bfloat16"])
def test_neither_does_it_where_activations_are_stored_in_fewer_bits(tiny_unet: nn.Module, cache: CacheFormat) -> None:
    whole = learned(tiny_unet, 20, cache=cache)[0]
    assert not same_integers(whole, learned(tiny_unet, 20)[0])  # the format matters
    assert same_integers(learned(tiny_unet, 20, cache=cache, cache_bytes=20_000)[0], whole)
    _, shelf, _ = learned(tiny_unet, 20, cache=cache, log=RecordedProgress(2))
    assert same_integers(learned(tiny_unet, 20, cache=cache, results=shelf.results)[0], whole)


@pytest.mark.parametrize(("cache_bytes", "passes"), [(2**30, 0), (20_000, 2)])
def test_finished_units_run_again_only_where_the_cache_has_no_room_for_what_they_return(
    network: nn.Module, cache_bytes: int, passes: int
) -> None:
    model = quantizable(network, weight=3, activation=None)
    log = Runs(model)
    _, shelf, _ = learned(network, 1, cache_bytes=cache_bytes, log=log, model=model)
    units = [unit for unit in shelf.results if unit != TEMPORAL_UNIT]
    # 24 samples go through the network 16 at a time, once for every unit that is still to come
    expected = {unit: {passes * (len(units) - 1 - i)} for i, unit in enumerate(units)}
    assert {unit: log.after(unit, shelf.results[unit].integers) for unit in units} == expected


def test_iterations_matter(run: Run, short: QuantizedNetwork) -> None:
    assert not same_integers(run[0], short)


def test_reconstruction_leaves_the_float_network_alone(network: nn.Module, run: Run) -> None:
    state = parameters(quantizable(network))
    assert all(torch.equal(parameter, state[name]) for name, parameter in network.named_parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in network.modules())
    assert not any(parameter.requires_grad for parameter in network.parameters())


def test_data_at_a_timestep_that_was_not_calibrated_is_refused_before_a_unit_learns(tiny_unet: nn.Module) -> None:
    model, data, progress = quantizable(tiny_unet), calibration(tiny_unet), RecordedProgress()
    moved = dataclasses.replace(data, t=data.t + 1)
    given = context(model, tiny_unet, moved, progress=progress)
    with pytest.raises(ValueError, match="is outside the calibrated finite set"):
        reconstruct(
            given, TemporalAware()(structure(tiny_unet), frozenset(model.plan.layers)), config(2, rounding=ROUNDING)
        )
    assert progress.expected == []


def test_frozen_temporal_layers_are_rounded_to_nearest_and_the_others_learn(tiny_unet: nn.Module) -> None:
    parts, data = structure(tiny_unet), calibration(tiny_unet)
    method = Reconstruct(TemporalFrozen(), EveryKth(1), rounding_config(5))
    model, nearest = quantizable(tiny_unet), quantizable(tiny_unet)
    method(context(model, tiny_unet, data))
    RoundToNearest()(context(nearest, tiny_unet, data))
    same = {
        layer: all(
            torch.equal(a.codes, b.codes) for a, b in zip(model.integers[layer], nearest.integers[layer], strict=True)
        )
        for layer in model.weight_layers()
    }
    assert {layer for layer in same if layer in parts.temporal_layers} <= {
        layer for layer, equal in same.items() if equal
    }
    assert not all(same.values())

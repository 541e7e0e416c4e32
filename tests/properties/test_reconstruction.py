"""Learning the rounding of weights, one unit at a time."""

import contextlib
import itertools
from collections import Counter
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from tests.conftest import TIMESTEPS, calibrated, example_inputs, quantizable
from tfmq_exp.calibration.dataset import CalibrationSet
from tfmq_exp.calibration.timesteps import EveryKth
from tfmq_exp.denoisers.structure import Kind, Role
from tfmq_exp.denoisers.unet import read_structure
from tfmq_exp.methods.weights import Reconstruct, RoundToNearest
from tfmq_exp.reconstruction.activation_cache import RandomBatches, SpillAllocator, TensorTree
from tfmq_exp.reconstruction.callbacks import UnitReport, UnitResult
from tfmq_exp.reconstruction.capture import (
    OutputReplay,
    bytes_at,
    call,
    capture_float,
    capture_inputs,
    groups_within,
    run_unit,
)
from tfmq_exp.reconstruction.inputs import QuantizedInputs
from tfmq_exp.reconstruction.loop import ComputeConfig, ReconstructionContext, quiet_trainer, reconstruct
from tfmq_exp.reconstruction.module import LearnRounding, ReconstructionConfig
from tfmq_exp.reconstruction.objectives import Annealing, Lp
from tfmq_exp.reconstruction.units import Blockwise, TemporalAware, TemporalFrozen
from tfmq_exp.surgery.quantized_unet import QuantizedUNet

CPU = torch.device("cpu")
TEMPORAL_UNIT = "temporal_information_block"

pytestmark = pytest.mark.filterwarnings("ignore::Warning:pytorch_lightning")


class Shelf:
    """Keeps finished units in memory, and what the model's parameters were after each."""

    def __init__(self, model: QuantizedUNet, kept: Mapping[str, UnitResult] | None = None) -> None:
        self.model = model
        self.kept = dict(kept or {})
        self.reports: dict[str, UnitReport] = {}
        self.snapshots = [parameters(model)]

    def get(self, unit: str) -> UnitResult | None:
        return self.kept.get(unit)

    def put(self, unit: str, learned: UnitResult, report: UnitReport) -> None:
        self.kept[unit], self.reports[unit] = learned, report
        self.snapshots.append(parameters(self.model))

    def part(self, name: str) -> "Shelf":
        raise AssertionError("nothing here goes over the same units twice")


class Interruption(Exception):  # noqa: N818 - nothing is wrong
    """Stands for a kill."""


class Log:
    """Notes what it is told; interrupts after so many units."""

    def __init__(self, units: int | None = None) -> None:
        self.limit = units
        self.expected = 0
        self.finishings: list[tuple[str, bool]] = []
        self.iterations: Counter[str] = Counter()

    def start(self, units: int) -> None:
        self.expected = units

    def progress(self, what: str, number: int, of: int) -> None:
        assert 1 <= number <= of

    def iteration(self, unit: str, number: int, of: int, loss: float) -> None:
        assert 1 <= number <= of
        self.iterations[unit] += 1

    def finished(self, unit: str, report: UnitReport | None) -> None:
        self.finishings.append((unit, report is not None))
        if len(self.finishings) == self.limit:
            raise Interruption


class Runs(Log):
    """Counts how often every layer computes something, in all and until its unit is finished."""

    def __init__(self, model: QuantizedUNet) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()
        self.until: dict[str, Counter[str]] = {}
        for site in model.weight_layers():
            # inside the layer: a layer that is a unit itself would also be seen by its own hooks when it is replayed
            model.layer(site).input_quantizer.register_forward_hook(lambda *_, site=site: self.counts.update([site]))

    def finished(self, unit: str, report: UnitReport | None) -> None:
        self.until[unit] = Counter(self.counts)
        super().finished(unit, report)

    def after(self, unit: str, sites: Collection[str]) -> set[int]:
        return {self.counts[site] - self.until[unit][site] for site in sites}


def parameters(model: QuantizedUNet) -> dict[str, Tensor]:
    named = model.unet.named_parameters()
    return {name: parameter.detach().clone() for name, parameter in named if "quantizer" not in name}


def means(cache_bytes: int = 2**30) -> ComputeConfig:
    return ComputeConfig(batch=16, cache_bytes=cache_bytes, trainer=quiet_trainer(torch.device("cpu")))


def recipe(iterations: int) -> ReconstructionConfig:
    return ReconstructionConfig(
        iterations, 8, Lp(2.0), QuantizedInputs(), LearnRounding(3e-2, 0.01, Annealing(0.2, 20.0, 2.0))
    )


def calibration(unet: nn.Module, each: int = 6, seed: int = 2) -> CalibrationSet:
    """As many samples of each timestep."""
    inputs = example_inputs(unet, tuple(t for t in TIMESTEPS for _ in range(each)), seed)
    steps = torch.arange(len(TIMESTEPS)).repeat_interleave(each)
    conditions = {name: value for name, value in inputs.items() if name not in ("sample", "timestep")}
    return CalibrationSet(inputs["sample"], inputs["timestep"], steps, torch.arange(len(steps)), conditions)


def learned(
    unet: nn.Module,
    iterations: int,
    *,
    cache_bytes: int = 2**30,
    kept: Mapping[str, UnitResult] | None = None,
    log: Log | None = None,
    model: QuantizedUNet | None = None,
) -> tuple[QuantizedUNet, Shelf, Log]:
    """A fresh model (or this one), reconstructed until the end or until the log interrupts."""
    model, log = model or quantizable(unet, weight=3, activation=None), log or Log()
    shelf, parts, data = Shelf(model, kept), read_structure(unet, example_inputs(unet)), calibration(unet)
    units = TemporalAware()(parts, frozenset(model.weight_layers()))
    with contextlib.suppress(Interruption):
        reconstruct(
            ReconstructionContext(model, unet, parts, data, means(cache_bytes), 0, shelf, log),
            units,
            recipe(iterations),
        )
    return model, shelf, log


def same_integers(one: QuantizedUNet, other: QuantizedUNet) -> bool:
    return one.integers.keys() == other.integers.keys() and all(
        torch.equal(a.codes, b.codes) and torch.equal(a.dequantize(), b.dequantize())
        for site in one.integers
        for a, b in zip(one.integers[site], other.integers[site], strict=True)
    )


def output_error(model: nn.Module, unet: nn.Module, data: CalibrationSet) -> float:
    with torch.no_grad():
        return float((model(**data.inputs(CPU)).sample - unet(**data.inputs(CPU)).sample).square().mean())


Run = tuple[QuantizedUNet, Shelf, Log]


@pytest.fixture(scope="module")
def run(unet: nn.Module) -> Run:
    """A whole reconstruction of each family, long enough to learn something."""
    return learned(unet, 30)


def test_every_weight_becomes_integer(unet: nn.Module, run: Run) -> None:
    model, shelf, log = run
    sites = set(read_structure(unet, example_inputs(unet)).sites)
    assert set(model.integers) == sites
    assert log.expected == len(shelf.kept) == len(log.finishings)
    assert set(log.iterations) == set(shelf.kept)
    assert not model.weight_quantizers()
    for site, (integers,) in model.integers.items():
        assert torch.equal(model.layer(site).weight, integers.dequantize())
        # each weight went to one of the two points beside it
        wanted = unet.get_submodule(site).weight.clamp(integers.dequantize().min(), integers.dequantize().max())
        assert ((integers.dequantize() - wanted).abs() <= 1.001 * integers.qparams.scale).all()


def test_units_are_nearer_to_the_float_network_than_with_nearest_rounding(run: Run) -> None:
    reports = run[1].reports.values()
    better = [report.unit for report in reports if report.error_after < report.error_before]
    assert len(better) >= 0.8 * len(reports)
    assert all(report.error_after < 1.05 * report.error_before for report in reports)


def test_outputs_are_nearer_to_the_float_network_than_with_nearest_rounding(unet: nn.Module, run: Run) -> None:
    nearest = calibrated(quantizable(unet, weight=3, activation=None))
    for data in (calibration(unet), calibration(unet, seed=9)):
        assert output_error(run[0], unet, data) < 0.9 * output_error(nearest, unet, data)


def test_unit_changes_its_own_weights_only(unet: nn.Module, run: Run) -> None:
    _, shelf, log = run
    for (unit, _), before, after in zip(log.finishings, shelf.snapshots, shelf.snapshots[1:], strict=False):
        changed = {name for name, value in after.items() if not torch.equal(value, before[name])}
        assert changed == {f"{site}.weight" for site in shelf.kept[unit].integers}
    assert len(shelf.snapshots) == 1 + len(shelf.kept)
    assert not any(learned.activations for learned in shelf.kept.values())


def test_temporal_unit_learns_the_temporal_sites_first_and_alone(unet: nn.Module, run: Run) -> None:
    _, shelf, log = run
    parts = read_structure(unet, example_inputs(unet))
    assert log.finishings[0] == (TEMPORAL_UNIT, True)
    assert set(shelf.kept[TEMPORAL_UNIT].integers) == set(parts.temporal_sites)
    others = [site for unit, learned in shelf.kept.items() if unit != TEMPORAL_UNIT for site in learned.integers]
    assert not any("time" in site for site in others)


def test_blockwise_learns_embedding_projections_inside_their_blocks(unet: nn.Module) -> None:
    parts = read_structure(unet, example_inputs(unet))
    units = {unit.name: unit for unit in Blockwise()(parts, frozenset(parts.sites))}
    for site in parts.by_role(Role.TIME_PROJ):
        block = site.name.removesuffix(".time_emb_proj")
        assert units[block].kind is Kind.RESIDUAL
        assert site.name in units[block].sites


@pytest.fixture(scope="module")
def short(unet: nn.Module) -> QuantizedUNet:
    """A reconstruction of as few iterations as have a choice of batches."""
    return learned(unet, 2)[0]


def test_interrupted_run_ends_as_the_uninterrupted_one(unet: nn.Module, short: QuantizedUNet) -> None:
    _, shelf, _ = learned(unet, 2, log=Log(units=2))
    assert len(shelf.kept) == 2
    resumed, after, log = learned(unet, 2, kept=shelf.kept)
    assert [is_new for _, is_new in log.finishings] == [False] * 2 + [True] * (log.expected - 2)
    assert len(after.reports) == log.expected - 2
    assert same_integers(resumed, short)


def test_size_of_the_cache_does_not_matter(unet: nn.Module, short: QuantizedUNet) -> None:
    assert same_integers(learned(unet, 2, cache_bytes=20_000)[0], short)


@pytest.mark.parametrize(("cache_bytes", "passes"), [(2**30, 0), (20_000, 2)])
def test_finished_units_run_again_only_where_the_cache_has_no_room_for_what_they_return(
    unet: nn.Module, cache_bytes: int, passes: int
) -> None:
    model = quantizable(unet, weight=3, activation=None)
    log = Runs(model)
    _, shelf, _ = learned(unet, 1, cache_bytes=cache_bytes, log=log, model=model)
    units = [unit for unit in shelf.kept if unit != TEMPORAL_UNIT]
    # 24 samples go through the network 16 at a time, once for every unit that is still to come
    expected = {unit: {passes * (len(units) - 1 - i)} for i, unit in enumerate(units)}
    assert {unit: log.after(unit, shelf.kept[unit].integers) for unit in units} == expected


def test_iterations_matter(run: Run, short: QuantizedUNet) -> None:
    assert not same_integers(run[0], short)


def test_reconstruction_leaves_the_float_network_alone(unet: nn.Module, run: Run) -> None:
    state = parameters(quantizable(unet))
    assert all(torch.equal(parameter, state[name]) for name, parameter in unet.named_parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in unet.modules())
    assert not any(parameter.requires_grad for parameter in unet.parameters())


# what units are fed and return


def recorded(
    model: nn.Module, modules: Mapping[str, nn.Module], data: CalibrationSet, batch: int
) -> tuple[dict[str, list[list[Tensor]]], dict[str, list[list[Tensor]]]]:
    """Tensors that go into and come out of modules during whole forward passes."""
    inputs: dict[str, list[list[Tensor]]] = {name: [] for name in modules}
    outputs: dict[str, list[list[Tensor]]] = {name: [] for name in modules}

    def hook(name: str, args: Any, kwargs: Any, output: Any) -> None:
        inputs[name].append([tensor.clone() for tensor in tensors_of((args, kwargs))])
        outputs[name].append([tensor.clone() for tensor in tensors_of(output)])

    handles = [
        module.register_forward_hook(lambda _m, a, k, out, name=name: hook(name, a, k, out), with_kwargs=True)
        for name, module in modules.items()
    ]
    with torch.no_grad():
        for start in range(0, len(data), batch):
            model(**data[slice(start, start + batch)].inputs(CPU))
    for handle in handles:
        handle.remove()
    return inputs, outputs


def tensors_of(structure: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(structure) if isinstance(leaf, Tensor)]


def joined(batches: list[list[Tensor]]) -> list[Tensor]:
    return [torch.cat(parts) for parts in zip(*batches, strict=True)]


def equal(some: list[Tensor], others: list[Tensor]) -> bool:
    return len(some) == len(others) and all(map(torch.equal, some, others))


def test_captured_inputs_are_those_of_a_whole_forward(unet: nn.Module) -> None:
    data, model = calibration(unet, each=3), calibrated(quantizable(unet, weight=3, activation=None))
    units = Blockwise()(read_structure(unet, example_inputs(unet)), frozenset(model.weight_layers()))
    modules = {unit.name: unit.module(model.unet) for unit in units}
    inputs, outputs = recorded(model, modules, data, 5)
    for name, module in modules.items():
        captured = capture_inputs(model, module, data, 5, SpillAllocator(2**30))
        assert equal(captured.tensors, [data.t, *joined(inputs[name])])
        # and the unit can be called again with them; their strides differ, and with them the order of summation
        again = call(module, model.context, captured.structure([tensor[:5] for tensor in captured.tensors]))
        torch.testing.assert_close(tensors_of(again), outputs[name][0], atol=5e-6, rtol=0)
        returned = run_unit(module, model.context, captured, 5, SpillAllocator(2**30))
        torch.testing.assert_close(returned.tensors, joined(outputs[name]), atol=5e-6, rtol=0)


@pytest.mark.parametrize("fed", [False, True])
def test_what_the_float_network_does_is_what_a_whole_forward_does(unet: nn.Module, fed: bool) -> None:
    data, parts = calibration(unet, each=3), read_structure(unet, example_inputs(unet))
    units = Blockwise()(parts, frozenset(parts.sites))
    modules = {unit.name: unit.module(unet) for unit in units}
    views = capture_float(unet, units, data, 5, SpillAllocator(2**30), fed=fed)
    inputs, outputs = recorded(unet, modules, data, 5)
    sizes = bytes_at(unet, modules, data, fed=fed)
    assert set(views) == set(modules)
    for name, view in views.items():
        wanted = joined(inputs[name]) if fed else []
        assert equal(view.returned.tensors, joined(outputs[name]))
        assert equal(view.fed.tensors if view.fed else [], [data.t, *wanted] if fed else [])
        assert sizes[name] * len(data) == sum(tensor.nbytes for tensor in [*view.returned.tensors, *wanted])


def test_capture_stops_where_everything_was_seen(unet: nn.Module) -> None:
    data, parts = calibration(unet, each=1), read_structure(unet, example_inputs(unet))
    units = [unit for unit in Blockwise()(parts, frozenset(parts.sites)) if unit.name.startswith("down_blocks")]
    beyond: list[int] = []
    handle = unet.mid_block.register_forward_hook(lambda *_: beyond.append(1))
    capture_inputs(unet, units[-1].module(unet), data, 2, SpillAllocator(2**30))
    capture_float(unet, units, data, 2, SpillAllocator(2**30), fed=True)
    handle.remove()
    assert units
    assert not beyond


def test_replayed_units_feed_later_ones_the_same_numbers(unet: nn.Module) -> None:
    data, model = calibration(unet, each=3), calibrated(quantizable(unet, weight=3, activation=None))
    units = Blockwise()(read_structure(unet, example_inputs(unet)), frozenset(model.weight_layers()))
    replay = OutputReplay(2**30)
    different = []
    for unit in units:
        module = unit.module(model.unet)
        run_as_usual = capture_inputs(model, module, data, 5, SpillAllocator(2**30))
        with replay.instead(5):
            replayed = capture_inputs(model, module, data, 5, SpillAllocator(2**30))
        different += [] if equal(replayed.tensors, run_as_usual.tensors) else [unit.name]
        replay.add(module, run_unit(module, model.context, replayed, 5, SpillAllocator(2**30)))
    assert len(replay.outputs) == len(units)
    assert not different


def test_the_oldest_outputs_make_room_for_new_ones() -> None:
    units = [nn.Linear(1, 1) for _ in range(4)]
    replay = OutputReplay(budget=100)
    kept = []
    for unit, size in zip(units, (10, 10, 10, 26), strict=True):  # floats
        replay.add(unit, TensorTree.of(torch.zeros(size)))
        kept.append([units.index(other) for other in replay.outputs])
    assert kept == [[0], [0, 1], [1, 2], []]


def test_units_compute_again_after_a_replay() -> None:
    unit, x = nn.Linear(1, 1), torch.ones(3, 1)
    outputs = torch.arange(5.0)[:, None]
    replay, wanted = OutputReplay(budget=100), unit(x)
    replay.add(unit, TensorTree.of(outputs))
    for _ in range(2):
        with replay.instead(3):
            assert torch.equal(torch.cat([unit(x), unit(x[:2])]), outputs)
        assert torch.equal(unit(x), wanted)
    with pytest.raises(RuntimeError, match="inside"), replay.instead(3):
        raise RuntimeError("inside")
    assert torch.equal(unit(x), wanted)


def test_no_data_is_refused(tiny_unet: nn.Module) -> None:
    with pytest.raises(ValueError, match="no calibration data"):
        capture_inputs(tiny_unet, tiny_unet.conv_in, calibration(tiny_unet)[slice(0, 0)], 2, SpillAllocator(2**30))


# storage and batches


def test_storage_spills_beyond_its_budget(tmp_path: Path) -> None:
    storage = SpillAllocator(1000, tmp_path)
    first = storage.allocate((10, 25), torch.float32)
    assert not list(tmp_path.rglob("*"))
    second = storage.allocate((3, 7), torch.float64)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert [path.stat().st_size for path in files] == [3 * 7 * 8]
    first.fill_(1)
    second.copy_(torch.arange(21).reshape(3, 7))
    assert (second.shape, second.dtype) == ((3, 7), torch.float64)
    assert files[0].read_bytes() == torch.arange(21, dtype=torch.float64).numpy().tobytes()
    storage.clear()
    assert not list(tmp_path.rglob("*"))
    storage.allocate((250,), torch.float32)
    assert not list(tmp_path.rglob("*"))


@pytest.mark.parametrize("budget", [0, 2**20])
def test_leaves_hold_a_structure_over_all_samples(budget: int) -> None:
    def batch(start: int, stop: int) -> Any:
        rows = torch.arange(start, stop)
        return ((rows.float()[:, None], None), {"flag": True, "nested": [rows, "name"]})

    leaves = TensorTree.like(batch(0, 3), 8, SpillAllocator(budget))
    for start in (0, 3, 6):
        leaves.write(start, batch(start, min(start + 3, 8)))
    rows = torch.tensor([6, 1])
    (x, nothing), further = leaves.structure([tensor[rows] for tensor in leaves.tensors])
    assert x.tolist() == [[6.0], [1.0]]
    assert nothing is None
    assert further["flag"] is True
    assert further["nested"][0].tolist() == [6, 1]
    assert further["nested"][1] == "name"
    assert len(leaves) == 8
    assert leaves.nbytes == 8 * (4 + 8)
    assert leaves.whole[1]["nested"][0].tolist() == list(range(8))
    assert leaves.every(3).whole[0][0].tolist() == [[0.0], [3.0], [6.0]]
    batches = [structure[1]["nested"] for structure in leaves.batches(3, CPU)]
    assert [(rows.tolist(), name) for rows, name in batches] == [
        ([0, 1, 2], "name"),
        ([3, 4, 5], "name"),
        ([6, 7], "name"),
    ]


def test_single_numbers_are_constants() -> None:
    example = {"x": torch.zeros(2, 2), "s": torch.tensor(5.0)}
    leaves = TensorTree.like(example, 4, SpillAllocator(2**20))
    leaves.write(2, example)
    assert leaves.structure([x[2:] for x in leaves.tensors])["s"] == 5
    assert len(leaves) == 4


def test_groups_are_consecutive_and_within_the_budget() -> None:
    sizes = {"a": 4, "b": 4, "c": 5, "d": 20, "e": 1, "f": 9}
    groups = groups_within(sizes, 10)
    assert groups == [["a", "b"], ["c"], ["d"], ["e", "f"]]


@pytest.mark.parametrize(("samples", "batch"), [(12, 4), (10, 4), (9, 2)])
def test_random_batches_visit_all_rows_once_per_pass(samples: int, batch: int) -> None:
    rows = torch.arange(samples)
    whole = samples // batch
    batches = list(RandomBatches([rows, -rows], batch, 5 * whole, seed=3).batches())
    assert len(batches) == 5 * whole
    assert all(torch.equal(first, -second) and len(first) == batch for first, second in batches)
    passes = [torch.cat([first for first, _ in batches[i : i + whole]]).tolist() for i in range(0, 5 * whole, whole)]
    assert all(len(set(seen)) == whole * batch for seen in passes)
    assert len({tuple(seen) for seen in passes}) == 5


def test_random_batches_depend_on_the_seed_alone() -> None:
    def drawn(seed: int) -> list[list[int]]:
        return [rows.tolist() for (rows,) in RandomBatches([torch.arange(20)], 5, 8, seed).batches()]

    assert drawn(1) == drawn(1)
    assert drawn(1) != drawn(2)


def test_few_rows_come_all_at_once() -> None:
    batches = list(RandomBatches([torch.arange(4)], 8, 3, seed=0).batches())
    assert [rows.tolist() for (rows,) in batches] == [[0, 1, 2, 3]] * 3


def test_annealing_is_off_during_warmup_then_falls_linearly() -> None:
    annealing = Annealing(warmup=0.2, start=20.0, end=2.0)
    active = [annealing.active(count, 100) for count in range(1, 101)]
    betas = [annealing.beta(count, 100) for count in range(20, 101)]
    assert active == [False] * 19 + [True] * 81
    assert betas[0] == pytest.approx(20.0)
    assert betas[-1] == pytest.approx(2.0)
    steps = [b - a for a, b in itertools.pairwise(betas)]
    assert steps == pytest.approx([-18 / 80] * 80)


@pytest.mark.parametrize(("iterations", "batch"), [(0, 8), (10, 0)])
def test_empty_recipes_are_refused(iterations: int, batch: int) -> None:
    with pytest.raises(
        ValueError, match=r"Recipe\.(iterations|batch) must be a whole number, at least 1 .*, got -?\d+$"
    ):
        ReconstructionConfig(
            iterations, batch, Lp(), QuantizedInputs(), LearnRounding(1e-3, 0.01, Annealing(0.2, 20.0, 2.0))
        )


def test_recipe_that_learns_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="this one neither"):
        ReconstructionConfig(10, 8, Lp(), QuantizedInputs())


def test_units_without_anything_to_learn_do_not_appear(tiny_conditional_unet: nn.Module) -> None:
    parts = read_structure(tiny_conditional_unet, example_inputs(tiny_conditional_unet))
    learnable = frozenset(site.name for site in parts.by_role(Role.ATTN_QKV, Role.ATTN_OUT))
    units = TemporalAware()(parts, learnable)
    assert {unit.kind for unit in units} == {Kind.ATTENTION}
    assert all("attentions" in unit.name for unit in units)


@pytest.mark.parametrize(("iterations", "together"), [(1, 10), (10, 10), (23, 10), (7, 3)])
def test_batches_come_in_chunks_and_none_is_lost(iterations: int, together: int) -> None:
    source = RandomBatches([torch.arange(20)], 5, iterations, 0, together)
    chunks = list(source)
    assert len(chunks) == len(source)
    assert [len(chunk) for chunk in chunks[:-1]] == [together] * (len(chunks) - 1)
    flat = [batch for chunk in chunks for batch in chunk]
    assert [b.tolist() for (b,) in flat] == [b.tolist() for (b,) in source.batches()]
    assert len(flat) == iterations


def test_frozen_temporal_layers_are_rounded_to_nearest_and_the_others_learn(tiny_unet: nn.Module) -> None:
    unet, parts, data = tiny_unet, read_structure(tiny_unet, example_inputs(tiny_unet)), calibration(tiny_unet)
    method = Reconstruct(TemporalFrozen(), EveryKth(1), recipe(5))
    model, nearest = quantizable(unet), quantizable(unet)
    method(ReconstructionContext(model, unet, parts, data, means(), 0, Shelf(model), Log()))
    RoundToNearest()(ReconstructionContext(nearest, unet, parts, data, means(), 0, Shelf(nearest), Log()))
    same = {
        site: all(
            torch.equal(a.codes, b.codes) for a, b in zip(model.integers[site], nearest.integers[site], strict=True)
        )
        for site in model.weight_layers()
    }
    assert {site for site in same if site in parts.temporal_sites} <= {site for site, equal in same.items() if equal}
    assert not all(same.values())

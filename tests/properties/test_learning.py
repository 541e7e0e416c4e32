"""Learning activation scales, alone or together with the rounding of weights, and what the loss looks at."""

import contextlib
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from tests.conftest import TIMESTEPS, calibrated, example_inputs, quantizable
from tfmq_exp.calibration.dataset import CalibrationSet
from tfmq_exp.calibration.timesteps import EveryKth
from tfmq_exp.denoisers.structure import UNetStructure
from tfmq_exp.denoisers.unet import read_structure
from tfmq_exp.methods.activations import CalibrateRanges, KeepRanges, LearnRanges
from tfmq_exp.methods.weights import Reconstruct, ReconstructJointly
from tfmq_exp.quant.layers import QuantLinear
from tfmq_exp.quant.observers import MinMax
from tfmq_exp.quant.quantizers.affine import AffineQuantizer, WeightQuantizer
from tfmq_exp.quant.quantizers.base import Mode
from tfmq_exp.quant.rounding import AdaRound, rectified_sigmoid
from tfmq_exp.quant.scales.static import StaticConfig, StaticScale
from tfmq_exp.quant.scales.tdq import TDQConfig
from tfmq_exp.quant.scales.timestep_groups import TimestepGroupConfig
from tfmq_exp.quant.spec import QParams, QuantSpec
from tfmq_exp.quant.timestep_context import TimestepContext
from tfmq_exp.quant.timestep_encoding import Frequency
from tfmq_exp.reconstruction.activation_cache import SpillAllocator
from tfmq_exp.reconstruction.inputs import FloatInputs, QuantizedInputs, UnitInputs
from tfmq_exp.reconstruction.loop import (
    ComputeConfig,
    ReconstructionContext,
    UnitReport,
    UnitResult,
    quiet_trainer,
    reconstruct,
)
from tfmq_exp.reconstruction.module import BlockReconstruction, LearnRounding, LearnScales, ReconstructionConfig
from tfmq_exp.reconstruction.objectives import Annealing, Fisher, Lp, Objective
from tfmq_exp.reconstruction.qdrop import MixedInputs
from tfmq_exp.reconstruction.units import Blockwise, TemporalAware
from tfmq_exp.surgery.config import AttentionBits, Bits, LayerBits
from tfmq_exp.surgery.quantized_unet import QuantizedUNet
from tfmq_exp.surgery.scales import ScalePlan

ROUNDING = LearnRounding(3e-2, 0.01, Annealing(0.2, 20.0, 2.0))
INTERVALS = TimestepGroupConfig(2, 1000)
GENERATED = TDQConfig(Frequency(32), (16, 16), 0.1, "zero")
SOURCES: dict[str, Any] = {
    "static": "none",
    "per step": "all",
    "intervals": ScalePlan(INTERVALS, INTERVALS),
    "generated": ScalePlan(GENERATED, GENERATED),
}
SHARDS = CalibrateRanges(12, EveryKth(1))

pytestmark = pytest.mark.filterwarnings("ignore::Warning:pytorch_lightning")


class Shelf:
    """Keeps finished units in memory; parts share their reports."""

    def __init__(self) -> None:
        self.kept: dict[str, UnitResult] = {}
        self.reports: list[UnitReport] = []
        self.parts: dict[str, Shelf] = {}

    def get(self, unit: str) -> UnitResult | None:
        return self.kept.get(unit)

    def put(self, unit: str, learned: UnitResult, report: UnitReport) -> None:
        self.kept[unit] = learned
        self.reports.append(report)

    def part(self, name: str) -> "Shelf":
        return self.parts.setdefault(name, Shelf())


class Interruption(Exception):  # noqa: N818 - nothing is wrong
    """Stands for a kill."""


class Log:
    """Notes what it is told; interrupts after so many new units."""

    def __init__(self, units: int | None = None) -> None:
        self.limit = units
        self.expected: list[int] = []
        self.new: list[str] = []
        self.old: list[str] = []

    def start(self, units: int) -> None:
        self.expected.append(units)

    def progress(self, what: str, number: int, of: int) -> None:
        assert 1 <= number <= of

    def iteration(self, unit: str, number: int, of: int, loss: float) -> None:
        assert 1 <= number <= of

    def finished(self, unit: str, report: UnitReport | None) -> None:
        (self.old if report is None else self.new).append(unit)
        if len(self.new) == self.limit:
            raise Interruption


def means() -> ComputeConfig:
    return ComputeConfig(batch=16, cache_bytes=2**30, trainer=quiet_trainer(torch.device("cpu")))


def recipe(
    iterations: int,
    *,
    rate: float | None = 2e-2,
    rounding: LearnRounding | None = None,
    objective: Objective = Lp(2.4),  # noqa: B008
    inputs: UnitInputs = FloatInputs(),  # noqa: B008
) -> ReconstructionConfig:
    return ReconstructionConfig(iterations, 8, objective, inputs, rounding, LearnScales(rate) if rate else None)


def calibration(unet: nn.Module, each: int = 6, seed: int = 2) -> CalibrationSet:
    """As many samples of each timestep, ordered by step."""
    inputs = example_inputs(unet, tuple(t for t in TIMESTEPS for _ in range(each)), seed)
    steps = torch.arange(len(TIMESTEPS)).repeat_interleave(each)
    conditions = {name: value for name, value in inputs.items() if name not in ("sample", "timestep")}
    return CalibrationSet(inputs["sample"], inputs["timestep"], steps, torch.arange(len(steps)), conditions)


def parts_of(unet: nn.Module) -> UNetStructure:
    return read_structure(unet, example_inputs(unet))


def frozen(unet: nn.Module, **further: Any) -> QuantizedUNet:
    """Integer weights, activations still off."""
    model = quantizable(unet, **further)
    model.calibrate_weights()
    for site in model.weight_layers():
        model.freeze(site)
    return model


def end_of_network(weight: int, activation: Bits) -> dict[str, Any]:
    """A plan of four units: temporal layers, two blocks, the last layer."""
    plan = LayerBits(weight, activation)
    sites = dict.fromkeys(("time_embedding.*", "up_blocks.1.*", "conv_out"), plan)
    return {"weight": None, "activation": None, "sites": sites}


def run(phase: Any, model: QuantizedUNet, unet: nn.Module, shelf: Shelf | None = None, log: Log | None = None) -> Shelf:
    """A method's phase until the end, or until the log interrupts."""
    shelf = shelf or Shelf()
    with contextlib.suppress(Interruption):
        phase(ReconstructionContext(model, unet, parts_of(unet), calibration(unet), means(), 0, shelf, log or Log()))
    return shelf


def learn(iterations: int, **further: Any) -> LearnRanges:
    return LearnRanges(SHARDS, TemporalAware(), EveryKth(1), recipe(iterations, **further))


def trainable(model: QuantizedUNet) -> dict[str, list[Tensor]]:
    quantizers = model.activation_quantizers().items()
    return {name: [p.detach().clone() for p in quantizer.source.trainable()] for name, quantizer in quantizers}


def same_state(one: QuantizedUNet, other: QuantizedUNet) -> bool:
    """Bit-equal weights, scales and zero points."""
    states = [model.unet.state_dict() for model in (one, other)]
    return states[0].keys() == states[1].keys() and all(torch.equal(v, states[1][k]) for k, v in states[0].items())


# scales alone


@pytest.mark.parametrize("source", SOURCES)
def test_learning_scales_lowers_errors_and_leaves_weights_and_zero_points(tiny_unet: nn.Module, source: str) -> None:
    settings = {"activation": 4, "output": 6, "scales": SOURCES[source], "attention": AttentionBits(4, 4)}
    observed, model = (frozen(tiny_unet, **settings) for _ in range(2))
    data = calibration(tiny_unet)
    SHARDS.ranges(observed, data, 0)
    log = Log()
    shelf = run(learn(5, rate=1e-2 if source == "generated" else 4e-3), model, tiny_unet, log=log)
    for site, (weight,) in model.integers.items():
        assert torch.equal(weight.codes, observed.integers[site][0].codes)
        assert torch.equal(model.layer(site).weight, observed.layer(site).weight)
    before, after = observed.activation_state(), model.activation_state()
    for name, value in after.items():
        if name.endswith("zero_point") or (source == "generated" and name.endswith("source.scale")):
            assert torch.equal(value, before[name])
    start, end = trainable(observed), trainable(model)
    assert all(start.values())
    for name, parameters in start.items():
        moved = [old != new for old, new in zip(parameters, end[name], strict=True)]
        assert all(part.any() if source == "generated" else part.all() for part in moved), name
        assert all(bool(new.isfinite().all()) for new in end[name])
    errors = [(report.error_before, report.error_after) for report in shelf.reports]
    assert sum(after for _, after in errors) < sum(before for before, _ in errors)
    units = TemporalAware()(parts_of(tiny_unet), frozenset(model.plan.sites))
    assert log.new == [unit.name for unit in units]
    assert log.expected == [len(units)]
    assert all(quantizer.mode is Mode.QUANTIZE for quantizer in model.activation_quantizers().values())
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert not any(module.training for module in model.modules() if not isinstance(module, nn.Identity))


@pytest.mark.parametrize("source", ["static", "generated"])
def test_tied_inputs_learn_as_one(tiny_unet: nn.Module, source: str) -> None:
    """Without the tie q, k and v observe the same range and go apart while they learn."""
    names = tuple(f"down_blocks.1.attentions.0.to_{part}" for part in "qkv")
    scales = {}
    for tied in (False, True):
        observed, model = (frozen(tiny_unet, activation=4, scales=SOURCES[source], tie_qkv=tied) for _ in range(2))
        SHARDS.ranges(observed, calibration(tiny_unet), 0)
        run(learn(5, rate=1e-2), model, tiny_unet)
        model.tabulate_scales()
        quantizers = [model.layer(name).input_quantizer for name in names]
        scales[tied] = [quantizer.source.scale for quantizer in quantizers]
        if source == "static":
            ranges = [observed.layer(name).input_quantizer.source.scale for name in names]
            assert torch.equal(ranges[0], ranges[1])
            assert torch.equal(ranges[0], ranges[2])
            assert not torch.equal(ranges[0], scales[tied][0])
    assert all(torch.equal(scale, scales[True][0]) for scale in scales[True])
    assert not torch.equal(scales[False][0], scales[False][1])


def test_only_layers_with_one_input_are_tied(tiny_conditional_unet: nn.Module) -> None:
    with pytest.raises(ValueError, match="without transformer blocks"):
        quantizable(tiny_conditional_unet, tie_qkv=True)


def test_learned_scales_bring_the_whole_network_nearer(tiny_conditional_unet: nn.Module) -> None:
    unet, data = tiny_conditional_unet, calibration(tiny_conditional_unet, seed=9)
    observed, model = (frozen(unet, weight=8, activation=4, attention=AttentionBits(4, 4)) for _ in range(2))
    SHARDS.ranges(observed, calibration(unet), 0)
    run(learn(8, inputs=QuantizedInputs(), rate=1e-2), model, unet)
    with torch.no_grad():
        wanted = unet(**data.inputs(torch.device("cpu"))).sample
        errors = [(m(**data.inputs(torch.device("cpu"))).sample - wanted).square().mean() for m in (observed, model)]
    assert errors[1] < errors[0]


@pytest.mark.parametrize("source", ["static", "generated"])
def test_interrupted_learning_of_scales_ends_as_the_uninterrupted_one(tiny_unet: nn.Module, source: str) -> None:
    settings = end_of_network(4, 4) | {"scales": SOURCES[source]}
    whole, killed, resumed = (frozen(tiny_unet, **settings) for _ in range(3))
    run(learn(3), whole, tiny_unet)
    shelf, log = run(learn(3), killed, tiny_unet, log=Log(units=2)), Log()
    assert len(shelf.kept) == 2
    run(learn(3), resumed, tiny_unet, shelf, log)
    assert (log.expected, len(log.old), len(log.new)) == ([4], 2, 2)
    assert same_state(resumed, whole)
    assert not same_state(killed, whole)


def test_every_width_is_learned_and_kept_on_its_own(tiny_unet: nn.Module) -> None:
    start, whole, killed, resumed = (frozen(tiny_unet, **end_of_network(4, (4, 8))) for _ in range(4))
    SHARDS.ranges(start, calibration(tiny_unet), 0)
    shelf = run(learn(3), whole, tiny_unet)
    assert not shelf.kept
    assert shelf.parts.keys() == {"a4", "a8"}
    assert shelf.parts["a4"].kept.keys() == shelf.parts["a8"].kept.keys()
    before, after = trainable(start), trainable(whole)
    assert all(not torch.equal(before[name][0], after[name][0]) for name in before)
    interrupted, log = run(learn(3), killed, tiny_unet, log=Log(units=6)), Log()
    assert [len(interrupted.parts[part].kept) for part in ("a4", "a8")] == [4, 2]
    run(learn(3), resumed, tiny_unet, interrupted, log)
    assert (log.expected, len(log.old), len(log.new)) == ([4, 4], 6, 2)
    assert same_state(resumed, whole)


def test_learning_one_width_leaves_the_other_alone(tiny_unet: nn.Module) -> None:
    start, model = (frozen(tiny_unet, **end_of_network(4, (4, 8))) for _ in range(2))
    SHARDS.ranges(start, calibration(tiny_unet), 0)
    run(learn(3), model, tiny_unet, log=Log(units=4))
    before, after = trainable(start), trainable(model)
    for name, quantizer in model.activation_quantizers().items():
        assert torch.equal(before[name][0], after[name][0]) is (quantizer.spec.bits == 8)


# weights, alone and together with scales


def test_weight_phase_skips_units_without_weights(tiny_unet: nn.Module) -> None:
    parts = parts_of(tiny_unet)
    attention = next(block.name for block in parts.blocks if block.name.startswith("mid_block.attentions"))
    without = {f"{attention}.*": LayerBits(None, 8), "conv_in": LayerBits(None, 8)}
    model = calibrated(quantizable(tiny_unet, attention=AttentionBits(8, 8), sites=without))
    fresh = quantizable(tiny_unet, attention=AttentionBits(8, 8), sites=without)
    units = Blockwise()(parts, frozenset(parts.sites))
    names = [unit.name for unit in units]
    for learned, skipped in (
        (recipe(1, rate=None, rounding=ROUNDING), {attention, "conv_in"}),
        (recipe(1), set()),
    ):
        shelf, log = Shelf(), Log()
        target = fresh if learned.rounding else model
        reconstruct(
            ReconstructionContext(target, tiny_unet, parts, calibration(tiny_unet), means(), 0, shelf, log),
            units,
            learned,
        )
        assert log.new == [name for name in names if name not in skipped]
        assert log.expected == [len(names) - len(skipped)]
        assert shelf.kept.keys() == set(names) - skipped
    assert (
        set(fresh.integers)
        == set(fresh.weight_layers())
        == set(parts.sites) - {site for site in parts.sites if site.startswith(attention) or site == "conv_in"}
    )


def jointly(iterations: int, keep: float = 0.5) -> ReconstructJointly:
    both = recipe(iterations, rate=2e-3, rounding=ROUNDING, objective=Lp(), inputs=MixedInputs(keep))
    return ReconstructJointly(TemporalAware(), EveryKth(1), both, SHARDS)


def test_joint_learning_moves_scales_and_rounds_all_weights(tiny_unet: nn.Module) -> None:
    settings: dict[str, Any] = {"weight": 3, "activation": 6, "attention": AttentionBits(6, 6)}
    model, observed = quantizable(tiny_unet, **settings), frozen(tiny_unet, **settings)
    SHARDS.ranges(observed, calibration(tiny_unet), 0)
    shelf = run(jointly(6), model, tiny_unet)
    run(KeepRanges(), model, tiny_unet)
    assert set(model.integers) == set(model.weight_layers()) == set(parts_of(tiny_unet).sites)
    assert not model.weight_quantizers()
    moved = 0
    for site, (weight,) in model.integers.items():
        exact = tiny_unet.get_submodule(site).weight
        assert torch.equal(model.layer(site).weight, weight.dequantize())
        inside = exact.clamp(weight.dequantize().min(), weight.dequantize().max())
        assert ((weight.dequantize() - inside).abs() <= 1.001 * weight.qparams.scale).all()
        assert torch.equal(weight.qparams.scale, observed.integers[site][0].qparams.scale)
        moved += int((weight.codes != observed.integers[site][0].codes).sum())
    assert moved
    nearest, learned = trainable(observed), trainable(model)
    assert all(not torch.equal(nearest[name][0], learned[name][0]) for name in nearest)
    assert all(bool((scale > 0).all()) for (scale,) in learned.values())
    errors = [(report.error_before, report.error_after) for report in shelf.reports]
    assert sum(after for _, after in errors) < sum(before for before, _ in errors)
    assert all(quantizer.mode is Mode.QUANTIZE for quantizer in model.activation_quantizers().values())
    assert not any(module._forward_hooks for module in model.modules())


def test_interrupted_joint_learning_ends_as_the_uninterrupted_one(tiny_unet: nn.Module) -> None:
    whole, killed, resumed = (quantizable(tiny_unet, **end_of_network(3, 6)) for _ in range(3))
    run(jointly(3), whole, tiny_unet)
    shelf, log = run(jointly(3), killed, tiny_unet, log=Log(units=2)), Log()
    assert len(shelf.kept) == 2
    run(jointly(3), resumed, tiny_unet, shelf, log)
    assert (log.expected, len(log.old), len(log.new)) == ([4], 2, 2)
    assert same_state(resumed, whole)


def test_split_weights_learn_both_halves(tiny_unet: nn.Module) -> None:
    nearest, model = frozen(tiny_unet, weight=3, split=True), quantizable(tiny_unet, weight=3, split=True)
    weights = Reconstruct(
        TemporalAware(), EveryKth(1), recipe(4, rate=None, rounding=ROUNDING, inputs=QuantizedInputs())
    )
    run(weights, model, tiny_unet)
    split = [site for site, line in model.plan.sites.items() if line.split]
    assert split
    for half in range(2):
        pairs = [(model.integers[site][half].codes, nearest.integers[site][half].codes) for site in split]
        assert any(not torch.equal(ours, theirs) for ours, theirs in pairs)


# AdaRound's start and penalty


def test_adaround_starts_at_the_fractional_part_and_takes_ties_up() -> None:
    q, spec = QParams(torch.tensor([[0.25]]), torch.tensor([[8.0]])), QuantSpec(4, axis=0)
    codes = torch.tensor([[-3.0, -2.5, -1.75, -0.5, 0.0, 0.25, 0.5, 0.75, 1.5, 2.5, 3.5]])
    weight = 0.25 * codes
    rounding = AdaRound(weight, q, spec)
    torch.testing.assert_close(rectified_sigmoid(rounding.v), codes - codes.floor(), atol=1e-6, rtol=0)
    rounding.harden()
    up = rounding(weight / q.scale)
    ties = (codes - codes.floor()) == 0.5
    assert torch.equal(up[~ties], codes[~ties].round())
    assert torch.equal(up[ties], codes[ties].floor() + 1)


def one_layer(penalty: float, iterations: int = 50) -> tuple[BlockReconstruction, list[Tensor], AdaRound]:
    """A linear layer whose rounding is learned, with a batch of (t, x, wanted)."""
    generator = torch.Generator().manual_seed(0)
    layer = QuantLinear.from_float(nn.Linear(6, 4, bias=False).requires_grad_(False))
    layer.weight.copy_(torch.randn(4, 6, generator=generator))
    layer.weight_quantizer = quantizer = WeightQuantizer(layer.weight, QuantSpec(3, axis=0), MinMax())
    quantizer.observe(layer.weight)
    quantizer.mode = Mode.QUANTIZE
    rounding = quantizer.learn_rounding(layer.weight)
    with torch.no_grad():
        rounding.v.add_(0.5)

    def arrange(batch: list[Tensor]) -> dict[str, Any]:
        t, x, wanted = batch
        return {"fed": {"float": (t, (x,), {})}, "wanted": wanted, "importance": None}

    learned = recipe(
        iterations, rate=None, rounding=LearnRounding(1e-3, penalty, Annealing(0.2, 20.0, 2.0)), objective=Lp()
    )
    lesson = BlockReconstruction(layer, TimestepContext((1,)), [rounding], [], arrange, learned)
    batch = [
        torch.ones(5, dtype=torch.long),
        torch.randn(5, 6, generator=generator),
        torch.randn(5, 4, generator=generator),
    ]
    return lesson, batch, rounding


def test_penalty_is_off_in_warm_up_and_its_exponent_falls_from_20_to_2() -> None:
    lesson, batch, rounding = one_layer(0.01)
    plain = one_layer(0.0)[0].loss(batch).item()
    h = (torch.sigmoid(rounding.v.detach().double()) * 1.2 - 0.1).clamp(0, 1)
    for count in range(1, 51):
        lesson.count = count
        beta = 20 - 18 * (count - 10) / 40
        assert lesson.loss(batch).item() == pytest.approx(plain, rel=1e-6)
        penalty = float((1 - (2 * h - 1).abs() ** beta).sum()) if count >= 10 else 0.0
        assert float(lesson.penalty()) == pytest.approx(0.01 * penalty, rel=1e-5)


@pytest.mark.parametrize("parts", [1, 2, 3, 5])
def test_gradients_are_those_of_the_error_and_the_penalty_however_many_parts(parts: int) -> None:
    lesson, batch, rounding = one_layer(0.01)
    lesson.recipe, lesson.count = replace(lesson.recipe, parts=parts), 30
    error = lesson.loss(batch)
    (wanted,) = torch.autograd.grad(error + lesson.penalty(), [rounding.v])
    lesson.set_gradients(batch)
    assert rounding.v.grad is not None
    torch.testing.assert_close(rounding.v.grad, wanted, rtol=1e-5, atol=1e-7)
    assert float(lesson.error) == pytest.approx(float(error), rel=1e-6)


def test_more_parts_than_rows_are_refused() -> None:
    with pytest.raises(ValueError, match="8 can have 1 to 8 parts, got 9"):
        replace(recipe(10), parts=9)


def test_loss_sums_over_channels_and_averages_over_the_rest() -> None:
    generator = torch.Generator().manual_seed(0)
    for shape, channels in (((3, 4), 4), ((3, 5, 4), 4), ((3, 4, 2, 2), 4)):
        prediction, target, importance = torch.rand(3, *shape, generator=generator, dtype=torch.float64)
        count = prediction.numel() / channels
        pairs = list(
            zip(prediction.flatten().tolist(), target.flatten().tolist(), importance.flatten().tolist(), strict=True)
        )
        for p in (2.0, 2.4):
            expected = sum(abs(a - b) ** p for a, b, _ in pairs) / count
            assert float(Lp(p).loss(prediction, target, importance)) == pytest.approx(expected)
        weighted = sum((a - b) ** 2 * weight for a, b, weight in pairs) / count
        assert float(Fisher().loss(prediction, target, importance)) == pytest.approx(weighted)
        assert float(Fisher().loss(prediction, target, None)) == pytest.approx(
            float(Lp(2.0).loss(prediction, target, None))
        )


# Fisher information


def drawn(unet: nn.Module, data: CalibrationSet, batch: int, seed: int) -> Tensor:
    """V of every sample."""
    generator = torch.Generator().manual_seed(seed)
    channels = unet.config["out_channels"]
    sizes = [len(data[slice(start, start + batch)]) for start in range(0, len(data), batch)]
    return torch.cat([torch.randn(size, channels, 8, 8, generator=generator) for size in sizes])


def importance(unet: nn.Module, data: CalibrationSet, seed: int = 0) -> dict[str, list[Tensor]]:
    units = TemporalAware()(parts_of(unet), frozenset(parts_of(unet).sites))
    found = Fisher(seed).importance(unet, units, data, 5, SpillAllocator(2**30))
    assert set(found) == {unit.name for unit in units if unit.driver == "denoiser"}
    return {name: leaves.tensors for name, leaves in found.items()}


def test_importance_of_the_output_is_the_square_of_the_draw(unet: nn.Module) -> None:
    data = calibration(unet, each=3)
    squared = drawn(unet, data, 5, seed=4).square()
    (found,) = importance(unet, data, seed=4)["conv_out"]
    torch.testing.assert_close(found, squared / squared.mean())


def test_importance_has_mean_1_and_the_shape_of_the_output_everywhere(unet: nn.Module) -> None:
    data, shapes = calibration(unet, each=3), dict[str, list[torch.Size]]()
    found = importance(unet, data)

    def note(name: str, out: Any) -> None:
        shapes[name] = [leaf.shape for leaf in pytree.tree_leaves(out) if isinstance(leaf, Tensor)]

    handles = [
        unet.get_submodule(name).register_forward_hook(lambda _m, _a, out, name=name: note(name, out)) for name in found
    ]
    with torch.no_grad():
        unet(**data.inputs(torch.device("cpu")))
    for handle in handles:
        handle.remove()
    for name, tensors in found.items():
        assert [tensor.shape for tensor in tensors] == shapes[name]
        assert all(float(tensor.mean()) == pytest.approx(1, rel=1e-4) for tensor in tensors)
        assert all(bool((tensor >= 0).all()) for tensor in tensors)
    assert not any(parameter.requires_grad for parameter in unet.parameters())
    assert not any(module._forward_hooks for module in unet.modules())


@pytest.mark.parametrize("kind", ["resnets", "attentions"])
def test_importance_is_the_squared_gradient_of_an_added_disturbance(unet: nn.Module, kind: str) -> None:
    data, v = calibration(unet, each=3), drawn(unet, calibration(unet, each=3), 5, seed=0)
    found = importance(unet, data)
    name = next(name for name in found if name.startswith("mid_block") and kind in name)
    disturbance = torch.zeros_like(found[name][0]).requires_grad_()
    handle = unet.get_submodule(name).register_forward_hook(lambda _m, _a, out: out + disturbance)
    (unet(**data.inputs(torch.device("cpu"))).sample * v).sum().backward()
    handle.remove()
    squared = disturbance.grad.square()  # type: ignore[union-attr]
    torch.testing.assert_close(found[name][0], squared / squared.mean(), rtol=1e-3, atol=1e-5)


def test_draws_of_importance_depend_on_the_seed(tiny_unet: nn.Module) -> None:
    data = calibration(tiny_unet, each=1)
    same, again, other = (importance(tiny_unet, data, seed)["conv_in"][0] for seed in (1, 1, 2))
    assert torch.equal(same, again)
    assert not torch.equal(same, other)


def test_units_learn_with_importance(tiny_unet: nn.Module) -> None:
    models = [frozen(tiny_unet, **end_of_network(4, 4)) for _ in range(2)]
    for model, objective in zip(models, (Lp(), Fisher()), strict=True):
        run(learn(2, objective=objective), model, tiny_unet)
    assert not same_state(*models)


# QDrop


def captured() -> dict[Any, Any]:
    """A unit's inputs from both networks: timesteps, a tensor, something nested, and constants."""
    generator = torch.Generator().manual_seed(0)

    def fed() -> Any:
        x, y = torch.randn(2, 4, 50, 50, generator=generator)
        return torch.tensor([1, 2, 3, 4]), (x, None), {"deep": [y], "flag": True}

    return {"quantized": fed(), "float": fed()}


@pytest.mark.parametrize(("keep", "origin"), [(1.0, "quantized"), (0.0, "float")])
def test_inputs_that_are_never_mixed(keep: float, origin: str) -> None:
    data = captured()
    ours, theirs = (pytree.tree_flatten(structure) for structure in (MixedInputs(keep).combine(data), data[origin]))
    assert ours[1] == theirs[1]
    for a, b in zip(ours[0], theirs[0], strict=True):
        assert torch.equal(a, b) if isinstance(a, Tensor) else a is b


@pytest.mark.parametrize("keep", [0.2, 0.5, 0.9])
def test_inputs_are_mixed_element_by_element(keep: float) -> None:
    data = captured()
    torch.manual_seed(0)
    t, (x, nothing), further = MixedInputs(keep).combine(data)
    assert torch.equal(t, data["float"][0])
    assert nothing is None
    assert further["flag"] is True
    leaves = ((x, *(data[origin][1][0] for origin in ("quantized", "float"))),)
    leaves += ((further["deep"][0], *(data[origin][2]["deep"][0] for origin in ("quantized", "float"))),)
    for mixed, quantized, original in leaves:
        kept = mixed == quantized
        assert torch.equal(mixed, torch.where(kept, quantized, original))
        assert float(kept.float().mean()) == pytest.approx(keep, abs=0.02)


@pytest.mark.parametrize("keep", [0.0, 0.5, 1.0])
def test_activations_inside_the_unit_are_mixed_while_it_learns(keep: float) -> None:
    torch.manual_seed(0)
    x, quantizer = torch.randn(100, 100), AffineQuantizer(StaticScale(StaticConfig(), QuantSpec(2)))
    quantizer.observe(x)
    quantizer.mode = Mode.QUANTIZE
    quantized = quantizer(x)
    with MixedInputs(keep).inside([quantizer]):
        mixed = quantizer(x)
    kept = mixed == quantized
    assert torch.equal(mixed, torch.where(kept, quantized, x))
    assert float(kept.float().mean()) == pytest.approx(keep, abs=0.02)
    assert torch.equal(quantizer(x), quantized)


@pytest.mark.parametrize("keep", [-0.1, 1.1])
def test_impossible_probabilities_are_named(keep: float) -> None:
    with pytest.raises(ValueError, match=f"got {keep}"):
        MixedInputs(keep)


def test_joint_learning_refuses_a_choice_of_widths(tiny_unet: nn.Module) -> None:
    with pytest.raises(ValueError, match=r"not for \(4, 8\)"):
        run(jointly(1), quantizable(tiny_unet, activation=(4, 8)), tiny_unet)


def test_temporal_units_have_no_importance(tiny_unet: nn.Module) -> None:
    temporal = TemporalAware()(parts_of(tiny_unet), frozenset(parts_of(tiny_unet).sites))[:1]
    assert Fisher().importance(tiny_unet, temporal, calibration(tiny_unet), 8, SpillAllocator(2**30)) == {}

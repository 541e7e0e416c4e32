"""Learning activation scales, with integer weights."""

import pytest
import torch
from torch import nn

from tests.conftest import quantizable
from tests.helpers.calibration import calibration
from tests.helpers.learning import SHARDS, SOURCES, end_of_network, frozen, learn, run, same_state, trainable
from tests.helpers.reconstruction import RecordedProgress, structure
from tfmq_exp.quant.quantizers import Mode
from tfmq_exp.reconstruction.objectives import Fisher, Lp
from tfmq_exp.reconstruction.units import QuantizedInputs, TemporalAware
from tfmq_exp.surgery.config import AttentionBits

pytestmark = pytest.mark.filterwarnings("ignore::Warning:pytorch_lightning")


@pytest.mark.parametrize("source", SOURCES)
def test_learning_scales_lowers_errors_and_leaves_weights_and_zero_points(tiny_unet: nn.Module, source: str) -> None:
    settings = {"activation": 4, "output": 6, "scales": SOURCES[source], "attention": AttentionBits(4, 4)}
    observed, model = (frozen(tiny_unet, **settings) for _ in range(2))
    data = calibration(tiny_unet)
    SHARDS.ranges(observed, data, 0)
    log = RecordedProgress()
    shelf = run(learn(5, rate=1e-2 if source == "generated" else 4e-3), model, tiny_unet, log=log)
    for layer, (weight,) in model.integers.items():
        assert torch.equal(weight.codes, observed.integers[layer][0].codes)
        assert torch.equal(model.layer(layer).weight, observed.layer(layer).weight)
    before, after = observed.activation_state(), model.activation_state()
    for name, value in after.items():
        if name.endswith("zero_point") or (source == "generated" and name.endswith("scale_provider.scale")):
            assert torch.equal(value, before[name])
    start, end = trainable(observed), trainable(model)
    assert all(start.values())
    for name, parameters in start.items():
        moved = [old != new for old, new in zip(parameters, end[name], strict=True)]
        assert all(part.any() if source == "generated" else part.all() for part in moved), name
        assert all(bool(new.isfinite().all()) for new in end[name])
    errors = [(report.error_before, report.error_after) for report in shelf.reports.values()]
    assert sum(after for _, after in errors) < sum(before for before, _ in errors)
    units = TemporalAware()(structure(tiny_unet), frozenset(model.plan.layers))
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
        scales[tied] = [quantizer.scale_provider.scale for quantizer in quantizers]
        if source == "static":
            ranges = [observed.layer(name).input_quantizer.scale_provider.scale for name in names]
            assert torch.equal(ranges[0], ranges[1])
            assert torch.equal(ranges[0], ranges[2])
            assert not torch.equal(ranges[0], scales[tied][0])
    assert all(torch.equal(scale, scales[True][0]) for scale in scales[True])
    assert not torch.equal(scales[False][0], scales[False][1])


def test_only_layers_with_one_input_are_tied(tiny_conditional_unet: nn.Module) -> None:
    with pytest.raises(ValueError, match="without transformer blocks"):
        quantizable(tiny_conditional_unet, tie_qkv=True)


def test_learned_scales_bring_the_whole_network_nearer(tiny_conditional_unet: nn.Module) -> None:
    network, data = tiny_conditional_unet, calibration(tiny_conditional_unet, seed=9)
    observed, model = (frozen(network, weight=8, activation=4, attention=AttentionBits(4, 4)) for _ in range(2))
    SHARDS.ranges(observed, calibration(network), 0)
    run(learn(8, inputs=QuantizedInputs(), rate=1e-2), model, network)
    with torch.no_grad():
        wanted = network(**data.inputs(torch.device("cpu"))).sample
        errors = [(m(**data.inputs(torch.device("cpu"))).sample - wanted).square().mean() for m in (observed, model)]
    assert errors[1] < errors[0]


@pytest.mark.parametrize("source", ["static", "generated"])
def test_interrupted_learning_of_scales_ends_as_the_uninterrupted_one(tiny_unet: nn.Module, source: str) -> None:
    settings = end_of_network(4, 4) | {"scales": SOURCES[source]}
    whole, killed, resumed = (frozen(tiny_unet, **settings) for _ in range(3))
    run(learn(3), whole, tiny_unet)
    shelf, log = run(learn(3), killed, tiny_unet, log=RecordedProgress(2)), RecordedProgress()
    assert len(shelf.results) == 2
    run(learn(3), resumed, tiny_unet, shelf, log)
    assert (log.expected, len(log.restored), len(log.new)) == ([4], 2, 2)
    assert same_state(resumed, whole)
    assert not same_state(killed, whole)


def test_every_width_is_learned_and_kept_on_its_own(tiny_unet: nn.Module) -> None:
    start, whole, killed, resumed = (frozen(tiny_unet, **end_of_network(4, (4, 8))) for _ in range(4))
    SHARDS.ranges(start, calibration(tiny_unet), 0)
    shelf = run(learn(3), whole, tiny_unet)
    assert not shelf.results
    assert shelf.scopes.keys() == {"a4", "a8"}
    assert shelf.scopes["a4"].results.keys() == shelf.scopes["a8"].results.keys()
    before, after = trainable(start), trainable(whole)
    assert all(not torch.equal(before[name][0], after[name][0]) for name in before)
    interrupted, log = run(learn(3), killed, tiny_unet, log=RecordedProgress(6)), RecordedProgress()
    assert [len(interrupted.scopes[part].results) for part in ("a4", "a8")] == [4, 2]
    run(learn(3), resumed, tiny_unet, interrupted, log)
    assert (log.expected, len(log.restored), len(log.new)) == ([4, 4], 6, 2)
    assert same_state(resumed, whole)


def test_learning_one_width_leaves_the_other_alone(tiny_unet: nn.Module) -> None:
    start, model = (frozen(tiny_unet, **end_of_network(4, (4, 8))) for _ in range(2))
    SHARDS.ranges(start, calibration(tiny_unet), 0)
    run(learn(3), model, tiny_unet, log=RecordedProgress(4))
    before, after = trainable(start), trainable(model)
    for name, quantizer in model.activation_quantizers().items():
        assert torch.equal(before[name][0], after[name][0]) is (quantizer.spec.bits == 8)


def test_units_learn_with_importance(tiny_unet: nn.Module) -> None:
    models = [frozen(tiny_unet, **end_of_network(4, 4)) for _ in range(2)]
    for model, objective in zip(models, (Lp(), Fisher()), strict=True):
        run(learn(2, objective=objective), model, tiny_unet)
    assert not same_state(*models)

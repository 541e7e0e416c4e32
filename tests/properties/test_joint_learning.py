"""Weights and activation scales, phase by phase and together."""

from typing import Any

import pytest
import torch
from torch import nn

from tests.conftest import calibrated, quantizable
from tests.helpers.calibration import calibration
from tests.helpers.learning import SHARDS, end_of_network, frozen, jointly, run, same_state, trainable
from tests.helpers.reconstruction import ROUNDING, MemoryCheckpointer, RecordedProgress, config, context, structure
from tfmq_exp.calibration.timesteps import EveryKth
from tfmq_exp.methods.activations import KeepRanges
from tfmq_exp.methods.weights import Reconstruct
from tfmq_exp.quant.quantizers import Mode
from tfmq_exp.reconstruction.loop import reconstruct
from tfmq_exp.reconstruction.units import Blockwise, QuantizedInputs, TemporalAware
from tfmq_exp.surgery.config import AttentionBits, LayerBits

pytestmark = pytest.mark.filterwarnings("ignore::Warning:pytorch_lightning")


def test_weight_phase_skips_units_without_weights(tiny_unet: nn.Module) -> None:
    parts = structure(tiny_unet)
    attention = next(block.name for block in parts.blocks if block.name.startswith("mid_block.attentions"))
    without = {f"{attention}.*": LayerBits(None, 8), "conv_in": LayerBits(None, 8)}
    model = calibrated(quantizable(tiny_unet, attention=AttentionBits(8, 8), sites=without))
    fresh = quantizable(tiny_unet, attention=AttentionBits(8, 8), sites=without)
    units = Blockwise()(parts, frozenset(parts.layers))
    names = [unit.name for unit in units]
    for learned, skipped in (
        (config(1, rate=None, rounding=ROUNDING), {attention, "conv_in"}),
        (config(1), set()),
    ):
        shelf, log = MemoryCheckpointer(), RecordedProgress()
        target = fresh if learned.rounding else model
        reconstruct(context(target, tiny_unet, calibration(tiny_unet), shelf, log), units, learned)
        assert log.new == [name for name in names if name not in skipped]
        assert log.expected == [len(names) - len(skipped)]
        assert shelf.results.keys() == set(names) - skipped
    assert (
        set(fresh.integers)
        == set(fresh.weight_layers())
        == set(parts.layers) - {layer for layer in parts.layers if layer.startswith(attention) or layer == "conv_in"}
    )


def test_joint_learning_moves_scales_and_rounds_all_weights(tiny_unet: nn.Module) -> None:
    settings: dict[str, Any] = {"weight": 3, "activation": 6, "attention": AttentionBits(6, 6)}
    model, observed = quantizable(tiny_unet, **settings), frozen(tiny_unet, **settings)
    SHARDS.ranges(observed, calibration(tiny_unet), 0)
    shelf = run(jointly(6), model, tiny_unet)
    run(KeepRanges(), model, tiny_unet)
    assert set(model.integers) == set(model.weight_layers()) == set(structure(tiny_unet).layers)
    assert not model.weight_quantizers()
    moved = 0
    for layer, (weight,) in model.integers.items():
        exact = tiny_unet.get_submodule(layer).weight
        assert torch.equal(model.layer(layer).weight, weight.dequantize())
        inside = exact.clamp(weight.dequantize().min(), weight.dequantize().max())
        assert ((weight.dequantize() - inside).abs() <= 1.001 * weight.qparams.scale).all()
        assert torch.equal(weight.qparams.scale, observed.integers[layer][0].qparams.scale)
        moved += int((weight.codes != observed.integers[layer][0].codes).sum())
    assert moved
    nearest, learned = trainable(observed), trainable(model)
    assert all(not torch.equal(nearest[name][0], learned[name][0]) for name in nearest)
    assert all(bool((scale > 0).all()) for (scale,) in learned.values())
    errors = [(report.error_before, report.error_after) for report in shelf.reports.values()]
    assert sum(after for _, after in errors) < sum(before for before, _ in errors)
    assert all(quantizer.mode is Mode.QUANTIZE for quantizer in model.activation_quantizers().values())
    assert not any(module._forward_hooks for module in model.modules())


def test_interrupted_joint_learning_ends_as_the_uninterrupted_one(tiny_unet: nn.Module) -> None:
    whole, killed, resumed = (quantizable(tiny_unet, **end_of_network(3, 6)) for _ in range(3))
    run(jointly(3), whole, tiny_unet)
    shelf, log = run(jointly(3), killed, tiny_unet, log=RecordedProgress(2)), RecordedProgress()
    assert len(shelf.results) == 2
    run(jointly(3), resumed, tiny_unet, shelf, log)
    assert (log.expected, len(log.restored), len(log.new)) == ([4], 2, 2)
    assert same_state(resumed, whole)


def test_split_weights_learn_both_halves(tiny_unet: nn.Module) -> None:
    nearest, model = frozen(tiny_unet, weight=3, split=True), quantizable(tiny_unet, weight=3, split=True)
    weights = Reconstruct(
        TemporalAware(), EveryKth(1), config(4, rate=None, rounding=ROUNDING, inputs=QuantizedInputs())
    )
    run(weights, model, tiny_unet)
    split = [layer for layer, line in model.plan.layers.items() if line.split]
    assert split
    for half in range(2):
        pairs = [(model.integers[layer][half].codes, nearest.integers[layer][half].codes) for layer in split]
        assert any(not torch.equal(ours, theirs) for ours, theirs in pairs)


def test_joint_learning_refuses_a_choice_of_widths(tiny_unet: nn.Module) -> None:
    with pytest.raises(ValueError, match=r"not for \(4, 8\)"):
        run(jointly(1), quantizable(tiny_unet, activation=(4, 8)), tiny_unet)

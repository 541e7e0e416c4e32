"""Plans of quantization: roles, patterns, bits and scales of every layer, and what is no plan."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from hydra.utils import instantiate
from torch import nn

from tests.conftest import SCALES, TIMESTEPS, example_inputs, quantizable
from tests.e2e.jobs import composed
from tests.properties.test_surgery import OPERANDS, mixed_bits
from tfmq_exp.core.records import decode, encode
from tfmq_exp.denoisers.families.unet import attentions
from tfmq_exp.denoisers.read_structure import read_structure
from tfmq_exp.denoisers.structure import Role
from tfmq_exp.quant.scales.base import ScaleConfig
from tfmq_exp.quant.scales.dynamic import DynamicConfig
from tfmq_exp.quant.scales.generator import Normalised
from tfmq_exp.quant.scales.observed_ranges import StaticConfig, TimestepGroupConfig
from tfmq_exp.quant.scales.tdq import TDQConfig
from tfmq_exp.surgery.config import (
    STORED_SCALES,
    AttentionBits,
    Bits,
    LayerBits,
    QuantizationConfig,
    ScalePlan,
    SchemeConfig,
)
from tfmq_exp.surgery.resolve import STORED, ResolvedConfig, coverage, resolve

GENERATED = TDQConfig(Normalised(1000), (8,), dropout=0.2, last_layer_init="default")

EVERY_SCALE = SCALES | {
    "intervals": ScalePlan(TimestepGroupConfig(2, 1000), TimestepGroupConfig(3, 1000)),
    "dynamic": ScalePlan(DynamicConfig("sample"), DynamicConfig("tensor")),
    "generated": ScalePlan(GENERATED, StaticConfig()),
}


def plan_of(
    weight: int | None = 4, activation: Bits | None = 8, output: Bits | None = None, **further: Any
) -> QuantizationConfig:
    return QuantizationConfig({role.value: LayerBits(weight, activation, output) for role in Role}, **further)


def roles_without(role: str) -> dict[str, LayerBits]:
    return {other.value: LayerBits(4, 8) for other in Role if other.value != role}


def test_missing_role_is_named() -> None:
    with pytest.raises(ValueError, match=r"missing: shortcut$"):
        QuantizationConfig(roles_without("shortcut"))


@pytest.mark.parametrize(
    "pattern", ["mid.res.0.conv1", "mid_block.resnets.0.conv_1", "nothing like it", "*.*.*.*.*.*.x"]
)
def test_a_pattern_that_matches_no_layer_is_answered_with_names(pattern: str, tiny_unet: nn.Module) -> None:
    layers = read_structure(tiny_unet, example_inputs(tiny_unet)).layers
    with pytest.raises(
        ValueError, match=rf"'{re.escape(pattern)}' in surgery.sites matches no layer; layers are"
    ) as caught:
        quantizable(tiny_unet, sites={pattern: LayerBits(8, 8)})
    named = str(caught.value).partition("layers are called ")[2].removesuffix(", ...").split(", ")
    assert set(named) <= set(layers)
    assert "mid_block.resnets.0.conv1" in named or not pattern.startswith("mid")


def test_unknown_role_is_named() -> None:
    with pytest.raises(ValueError, match=r"wrong.*: novelty$"):
        QuantizationConfig({**roles_without(""), "novelty": LayerBits(4, 8)})


@pytest.mark.parametrize("bits", [0, 1, 9, 16])
def test_weight_bits_outside_2_to_8_are_named(bits: int) -> None:
    with pytest.raises(ValueError, match=f"weight bits must be 2 to 8 .* got {bits}$"):
        plan_of(weight=bits)
    with pytest.raises(ValueError, match=f"weight bits .* got {bits}$"):
        plan_of(sites={"conv_in": LayerBits(weight=bits)})


@pytest.mark.parametrize("bits", [0, 3, 9, 16])
def test_activation_bits_outside_4_to_8_are_named(bits: int) -> None:
    for wrong in ({"activation": bits}, {"activation": (8, bits)}, {"output": bits}):
        with pytest.raises(ValueError, match=f"activation bits must be 4 to 8 .* got {bits}$"):
            plan_of(**wrong)
    with pytest.raises(ValueError, match=f"attention operand bits .* got {bits}$"):
        plan_of(attention=AttentionBits(operands=bits))


@pytest.mark.parametrize("bits", [3, 17])
def test_probability_bits_outside_4_to_16_are_named(bits: int) -> None:
    with pytest.raises(ValueError, match=f"attention probability bits must be 4 to 16 .* got {bits}$"):
        plan_of(attention=AttentionBits(probabilities=bits))


def test_pattern_that_matches_nothing_is_named(network: nn.Module) -> None:
    with pytest.raises(ValueError, match=r"'up_blocks\.9\.\*'"):
        quantizable(network, sites={"conv_in": LayerBits(8, 8), "up_blocks.9.*": LayerBits(4, 8)})


def test_plan_that_quantizes_nothing_is_refused(network: nn.Module) -> None:
    with pytest.raises(ValueError, match="quantizes nothing"):
        quantizable(network, weight=None, activation=None)


def test_unknown_kind_of_scale_is_named() -> None:
    with pytest.raises(ValueError, match="'sometimes'"):
        decode({"kind": "sometimes"}, ScaleConfig, STORED_SCALES)


@pytest.mark.parametrize("kind", ["weights", "granularity", "activations"])
def test_unknown_kind_of_grid_is_named(kind: str) -> None:
    with pytest.raises(ValueError, match=rf"^SchemeConfig\.{kind} must be one of .* got 'sometimes'$"):
        SchemeConfig(**{kind: "sometimes"})


@pytest.mark.parametrize(
    ("grids", "bits", "scheme", "axis"),
    [
        (SchemeConfig(), 8, "symmetric", 0),
        (SchemeConfig(), 7, "affine", 0),
        (SchemeConfig(weights="affine"), 8, "affine", 0),
        (SchemeConfig(weights="symmetric"), 4, "symmetric", 0),
        (SchemeConfig(granularity="tensor", activations="symmetric"), 4, "affine", None),
    ],
)
def test_every_activation_and_weight_has_the_grid_of_the_plan(
    network: nn.Module, grids: SchemeConfig, bits: int, scheme: str, axis: int | None
) -> None:
    parts = read_structure(network, example_inputs(network))
    plan = plan_of(bits, 8, 6, attention=OPERANDS, grids=grids)
    resolved = resolve(plan, parts, tuple(attentions(network)), SCALES["none"], TIMESTEPS)
    lines = [line for layer in resolved.layers.values() for line in (layer.input, layer.output)]
    assert {(s.weight.bits, s.weight.scheme, s.weight.axis) for s in resolved.layers.values()} == {(bits, scheme, axis)}
    assert {spec.scheme for line in lines for spec in line.specs} == {grids.activations}
    for operands in resolved.operands.values():
        schemes = {part: line.specs[0].scheme for part, line in operands.items()}
        assert schemes == dict.fromkeys(("query", "key", "value"), grids.activations) | {"probabilities": "unsigned"}


def test_exceptions_win_over_roles_and_later_ones_over_earlier_ones(network: nn.Module) -> None:
    model = quantizable(
        network,
        sites={"down_blocks.*": LayerBits(3, 6), "down_blocks.0.*": LayerBits(2, None), "conv_out": LayerBits()},
    )
    bits = {
        layer: (line.weight.bits if line.weight else None, line.input.specs[0].bits if line.input else None)
        for layer, line in model.plan.layers.items()
    }
    for layer in read_structure(network, example_inputs(network)).layers:
        if layer == "conv_out":
            assert layer not in bits
        elif layer.startswith("down_blocks.0."):
            assert bits[layer] == (2, None)
        elif layer.startswith("down_blocks."):
            assert bits[layer] == (3, 6)
        else:
            assert bits[layer] == (4, 8)


@pytest.mark.parametrize("words", [["method.surgery.roles.stem=null"], ["+method.surgery.sites={conv_in: null}"]])
def test_a_role_or_a_layer_that_is_null_stays_float(network: nn.Module, tmp_path: Path, words: list[str]) -> None:
    plan = instantiate(composed(tmp_path, *words).method.surgery, _convert_="all")
    parts = read_structure(network, example_inputs(network))
    report = coverage(resolve(plan, parts, tuple(attentions(network)), SCALES["temporal"], TIMESTEPS), parts)
    assert report["float_weights"] == report["float_inputs"] == ["conv_in"]


@pytest.mark.parametrize("wrong", [8, "float", [8], {"weigth": 8}, {"weight": 8, "bits": 4}])
@pytest.mark.parametrize("name", ["roles.stem", "sites.conv_in"])
def test_what_is_no_plan_of_a_layer_is_named(name: str, wrong: object) -> None:
    kind, _, key = name.partition(".")
    roles = roles_without("") | ({key: wrong} if kind == "roles" else {})
    with pytest.raises(ValueError, match=rf"method\.surgery\.{name} must be null \(all float\) or bits"):
        QuantizationConfig(roles, sites={key: wrong} if kind == "sites" else {})  # type: ignore[arg-type]


@pytest.mark.parametrize("per_step", SCALES)
def test_scope_says_who_has_a_scale_per_step(network: nn.Module, per_step: str) -> None:
    model = quantizable(network, scales=per_step, output=8, attention=OPERANDS)
    temporal = read_structure(network, example_inputs(network)).temporal_layers
    for name, quantizer in model.activation_quantizers().items():
        is_temporal = name.removesuffix(".input_quantizer").removesuffix(".output_quantizer") in temporal
        expected = len(TIMESTEPS) if per_step == "all" or (per_step == "temporal" and is_temporal) else 1
        assert quantizer.scale_provider.scale.shape == (expected,)


@pytest.mark.parametrize("scales", EVERY_SCALE)
def test_resolved_plan_survives_json(network: nn.Module, scales: str) -> None:
    sites = mixed_bits(network) | {"conv_out": LayerBits(4, (4, 8))}
    plan = quantizable(
        network, sites=sites, attention=OPERANDS, scales=EVERY_SCALE[scales], split=True
    ).plan.tabulated()
    assert decode(json.loads(json.dumps(encode(plan, STORED))), ResolvedConfig, STORED) == plan
    assert plan.tabulated() == plan


def test_coverage_by_hand(network: nn.Module) -> None:
    parts = read_structure(network, example_inputs(network))
    model = quantizable(network, sites={"conv_in": LayerBits(None, 8), "conv_out": LayerBits(4, None)})
    stem, head = parts.layers["conv_in"], parts.layers["conv_out"]
    weights = sum(network.get_submodule(name).weight.numel() for name in parts.layers)
    macs = sum(layer.macs for layer in parts.layers.values())
    report = coverage(model.plan, parts)
    assert report["layers"] == len(parts.layers)
    assert report["weight_share"] == pytest.approx(1 - stem.weights / weights, abs=1e-12)
    assert report["mac_share_weights"] == pytest.approx(1 - stem.macs / macs, abs=1e-12)
    assert report["mac_share_weights_and_inputs"] == pytest.approx(1 - (stem.macs + head.macs) / macs, abs=1e-12)
    assert report["float_weights"] == ["conv_in"]
    assert report["float_inputs"] == ["conv_out"]

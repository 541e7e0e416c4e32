"""From the float network to the quantized one, and from there to a file and back."""

import copy
import json
import math
import re
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra.utils import instantiate
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from tests.conftest import SCALES, TIMESTEPS, calibrated, example_inputs, quantizable
from tests.e2e.jobs import composed
from tests.helpers.sampling import output
from tfmq_exp.core.records import decode, encode
from tfmq_exp.denoisers.families.unet import attentions, set_heads
from tfmq_exp.denoisers.read_structure import read_structure
from tfmq_exp.denoisers.structure import Role
from tfmq_exp.quant.quantizers import Mode
from tfmq_exp.quant.scales.base import ScaleConfig
from tfmq_exp.quant.scales.dynamic import DynamicConfig
from tfmq_exp.quant.scales.generator import Normalised
from tfmq_exp.quant.scales.observed_ranges import StaticConfig, TimestepGroupConfig
from tfmq_exp.quant.scales.tdq import TDQConfig
from tfmq_exp.surgery import serialization
from tfmq_exp.surgery.config import (
    STORED_SCALES,
    AttentionBits,
    Bits,
    LayerBits,
    QuantizationConfig,
    ScalePlan,
    SchemeConfig,
)
from tfmq_exp.surgery.quantized_network import QuantizedNetwork
from tfmq_exp.surgery.resolve import STORED, ResolvedConfig, coverage, resolve
from tfmq_exp.surgery.stored_tensors import pack, unpack

ALL_STEPS = 2 * TIMESTEPS
OPERANDS = AttentionBits(operands=8, probabilities=16)
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


def mixed_bits(network: nn.Module) -> dict[str, LayerBits]:
    """Weights of 2 to 8 bits and float ones, activations of 4 to 8 bits and float ones, all in one network."""
    weights, inputs, outputs = [2, 3, 4, 5, 6, 7, 8, None], [4, 5, 6, 7, 8, None], [None, None, 8, None, 4]
    layers = read_structure(network, example_inputs(network)).layers
    return {name: LayerBits(weights[i % 8], inputs[i % 6], outputs[i % 5]) for i, name in enumerate(layers)}


# everything off


def test_switched_off_is_the_float_network(network: nn.Module) -> None:
    inputs = example_inputs(network, ALL_STEPS)
    assert torch.equal(output(quantizable(network), inputs), output(network, inputs))


def test_switched_off_attention_operands_change_rounding_only(network: nn.Module) -> None:
    inputs = example_inputs(network, ALL_STEPS)
    model = quantizable(network, attention=OPERANDS)
    torch.testing.assert_close(output(model, inputs), output(network, inputs), atol=2e-6, rtol=0)


def test_switched_on_is_not_the_float_network(network: nn.Module) -> None:
    inputs = example_inputs(network, ALL_STEPS)
    weights_only = output(calibrated(quantizable(network, activation=None)), inputs)
    both = output(calibrated(quantizable(network)), inputs)
    operands_too = output(calibrated(quantizable(network, attention=OPERANDS)), inputs)
    outputs = [output(network, inputs), weights_only, both, operands_too]
    assert all(not torch.allclose(a, b, atol=1e-4) for i, a in enumerate(outputs) for b in outputs[:i])


def test_surgery_leaves_the_float_network_alone(network: nn.Module) -> None:
    inputs, state = example_inputs(network), copy.deepcopy(network.state_dict())
    types = [type(module) for module in network.modules()]
    processors = {name: module.processor for name, module in attentions(network).items()}
    before = output(network, inputs)
    calibrated(quantizable(network, weight=2, activation=4, scales="all", attention=OPERANDS))
    assert [type(module) for module in network.modules()] == types
    assert all(module.processor is processors[name] for name, module in attentions(network).items())
    assert all(torch.equal(value, state[name]) for name, value in network.state_dict().items())
    assert torch.equal(output(network, inputs), before)


# the plan


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


# running it


def test_timestep_outside_the_finite_set_is_named(network: nn.Module) -> None:
    model = calibrated(quantizable(network, scales="all"))
    for t in (2, 999, -1):
        with pytest.raises(ValueError, match=rf"timestep {t} is outside"):
            model(**example_inputs(network, (1, t)))


def test_uncalibrated_quantizer_is_named(network: nn.Module) -> None:
    model = quantizable(network, scales="all")
    with pytest.raises(
        RuntimeError, match=r"conv_in\.input_quantizer has seen no calibration data \(4 of its ranges, 4"
    ):
        model.set_activations(Mode.QUANTIZE)
    model.set_activations(Mode.OBSERVE)
    model(**example_inputs(network, TIMESTEPS[:3]))
    with pytest.raises(RuntimeError, match=r"_quantizer has seen no calibration data \(1 of its ranges, 4"):
        model.set_activations(Mode.QUANTIZE)


def test_integer_weights_are_signed_bytes_that_stand_for_the_weight(network: nn.Module) -> None:
    wanted = mixed_bits(network)
    model = calibrated(quantizable(network, sites=wanted))
    assert set(model.integers) == {name for name, plan in wanted.items() if plan.weight}
    for layer, ((codes, (scale, zero_point), spec),) in model.integers.items():
        assert int(codes.max()) < 2 ** wanted[layer].weight
        signed = codes.double() + spec.qmin - zero_point.double()
        assert torch.equal(signed, signed.round())
        assert signed.min() >= -128
        assert signed.max() <= 127
        weight = network.get_submodule(layer).weight
        # the grid of the whole range reaches every weight, up to the rounding of its zero point
        assert ((signed * scale - weight).abs() <= 1.001 * scale).all()
        assert torch.equal(model.layer(layer).weight, signed.float() * scale)


@pytest.mark.parametrize("per_step", ["temporal", "all"])
def test_mixed_steps_in_a_batch_equal_each_alone(network: nn.Module, per_step: str) -> None:
    # in double precision, where the batch size moves no activation across the middle between two integers
    model = calibrated(quantizable(network, scales=per_step, attention=OPERANDS)).double()
    inputs = example_inputs(network, (501, 1, 751, 501, 251))
    inputs = {key: value.double() if value.is_floating_point() else value for key, value in inputs.items()}
    together = output(model, inputs)
    for row in range(5):
        alone = output(model, {key: value[row : row + 1] for key, value in inputs.items()})
        torch.testing.assert_close(together[row : row + 1], alone, atol=1e-12, rtol=0)


# the file


@pytest.mark.parametrize("attention", [AttentionBits(), OPERANDS])
@pytest.mark.parametrize("per_step", SCALES)
def test_loaded_model_is_bit_equal(network: nn.Module, tmp_path: Path, per_step: str, attention: AttentionBits) -> None:
    model = calibrated(quantizable(network, scales=per_step, attention=attention, sites=mixed_bits(network)))
    inputs = example_inputs(network, ALL_STEPS, seed=5)
    before = output(model, inputs)
    model.tabulate_scales()
    serialization.save(model, tmp_path / "model.safetensors")
    loaded = serialization.load(tmp_path / "model.safetensors")
    assert torch.equal(output(model, inputs), before)
    assert torch.equal(output(loaded, inputs), before)
    assert loaded.plan == model.plan


def test_loaded_model_has_the_number_of_heads_of_the_saved_one(tiny_unet: nn.Module, tmp_path: Path) -> None:
    network = copy.deepcopy(tiny_unet)
    for module in attentions(network).values():
        set_heads(module, 8)
    model = calibrated(quantizable(network))
    serialization.save(model, tmp_path / "model.safetensors")
    inputs = example_inputs(network, TIMESTEPS)
    assert torch.equal(output(serialization.load(tmp_path / "model.safetensors"), inputs), output(model, inputs))
    assert not torch.equal(output(model, inputs), output(calibrated(quantizable(tiny_unet)), inputs))


def test_saving_float_weights_is_refused(network: nn.Module, tmp_path: Path) -> None:
    model = quantizable(network)
    model.calibrate_weights()
    model.freeze("conv_in")
    with pytest.raises(ValueError, match=r"weights are not integers yet, first 'time_embedding\.linear_1'"):
        serialization.save(model, tmp_path / "model.safetensors")


def test_saving_uncalibrated_activations_is_refused(network: nn.Module, tmp_path: Path) -> None:
    model = quantizable(network)
    model.calibrate_weights()
    for layer in model.weight_layers():
        model.freeze(layer)
    with pytest.raises(RuntimeError, match="has seen no calibration data"):
        serialization.save(model, tmp_path / "model.safetensors")


def header_size(path: Path) -> int:
    return 8 + struct.unpack("<Q", path.read_bytes()[:8])[0]


def test_size_is_bits_over_8_of_the_weights(network: nn.Module, tmp_path: Path) -> None:
    path, wanted = tmp_path / "model.safetensors", mixed_bits(network)
    size = serialization.save(calibrated(quantizable(network, sites=wanted)), path)
    assert size == path.stat().st_size
    temporal = read_structure(network, example_inputs(network)).temporal_layers
    expected = 4 * sum(parameter.numel() for parameter in network.parameters() if parameter.dim() == 1)
    for name, plan in wanted.items():
        weight = network.get_submodule(name).weight
        if plan.weight is None:
            expected += 4 * weight.numel()
        else:
            grid = 4 if plan.weight == 8 else 5  # a float32 scale and, unless symmetric, a byte of zero point
            expected += math.ceil(weight.numel() * plan.weight / 8) + grid * len(weight)
        quantized = [bits for bits in (plan.input, plan.output) if bits is not None]
        expected += 5 * len(quantized) * (len(TIMESTEPS) if name in temporal else 1)
    assert size - header_size(path) == expected


@pytest.fixture(scope="module")
def saved(tiny_unet: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("saved") / "model.safetensors"
    serialization.save(calibrated(quantizable(tiny_unet, attention=OPERANDS)), path)
    return path


def refused(path: Path, content: bytes) -> str:
    """The single line with which a file of this content is refused."""
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"model\.safetensors") as caught:
        serialization.load(path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("share", [0, 0.001, 0.3, 0.9, 0.9999])
def test_truncated_file_is_refused(saved: Path, tmp_path: Path, share: float) -> None:
    content = saved.read_bytes()
    refused(tmp_path / "model.safetensors", content[: int(share * len(content))])


def test_any_damaged_byte_is_refused(saved: Path, tmp_path: Path) -> None:
    content = saved.read_bytes()
    header = header_size(saved)
    positions = [*range(9), *range(9, header, header // 30), *range(header, len(content), len(content) // 10)]
    for position in positions:
        for flip in (1, 4):
            damaged = bytearray(content)
            damaged[position] ^= flip
            refused(tmp_path / "model.safetensors", bytes(damaged))


def rewritten(path: Path, folder: Path, tensors: dict[str, Tensor | None], **changes: object) -> Path:
    """A consistent file with other tensors (None: without this one) and another header."""
    with safe_open(path, framework="pt") as file:
        stored = {key: file.get_tensor(key) for key in file.keys()} | tensors  # noqa: SIM118
        header = json.loads(file.metadata()["header"]) | changes
    kept = {key: value for key, value in stored.items() if value is not None}
    header["sha256"] = serialization.checksum(json.dumps(header["manifest"], sort_keys=True), kept)
    save_file(kept, folder / "model.safetensors", {"header": json.dumps(header)})
    return folder / "model.safetensors"


def test_rewriting_alone_changes_nothing(saved: Path, tmp_path: Path, tiny_unet: nn.Module) -> None:
    inputs = example_inputs(tiny_unet, TIMESTEPS)
    copied = serialization.load(rewritten(saved, tmp_path, {}))
    assert torch.equal(output(copied, inputs), output(serialization.load(saved), inputs))


@pytest.mark.parametrize(
    "key",
    [
        "float/conv_in.bias",
        "weights/conv_out/0/codes",
        "weights/conv_out/0/zero_point",
        "activations/conv_in.input_quantizer/scale",
    ],
)
def test_missing_tensor_is_named(saved: Path, tmp_path: Path, key: str) -> None:
    path = rewritten(saved, tmp_path, {key: None})
    assert f"lacks '{key}'" in refused(path, path.read_bytes())


def test_extra_tensor_is_named(saved: Path, tmp_path: Path) -> None:
    path = rewritten(saved, tmp_path, {"weights/novelty/0/codes": torch.zeros(1)})
    assert "1 tensors that the model has no place for, first 'weights/novelty" in refused(path, path.read_bytes())


def test_tensor_of_another_size_is_refused(saved: Path, tmp_path: Path) -> None:
    path = rewritten(saved, tmp_path, {"float/conv_in.bias": torch.zeros(3)})
    assert "conv_in.bias" in refused(path, path.read_bytes())
    path = rewritten(saved, tmp_path, {"weights/conv_out/0/codes": torch.zeros(3, dtype=torch.uint8)})
    assert "3 bytes cannot hold 432 codes of 4 bits" in refused(path, path.read_bytes())


def test_other_versions_and_formats_are_named(saved: Path, tmp_path: Path) -> None:
    path = rewritten(saved, tmp_path, {}, version=1)
    assert f"version 1; this program reads tfmq_exp.quantized_unet version {serialization.VERSION}" in refused(
        path, path.read_bytes()
    )
    path = rewritten(saved, tmp_path, {}, format="another")
    assert f"holds another version {serialization.VERSION}" in refused(path, path.read_bytes())


def test_unknown_network_is_named(saved: Path, tmp_path: Path) -> None:
    with safe_open(saved, framework="pt") as file:
        manifest = json.loads(file.metadata()["header"])["manifest"]
    path = rewritten(saved, tmp_path, {}, manifest=manifest | {"network": "UNet1DModel"})
    assert "unknown network 'UNet1DModel'" in refused(path, path.read_bytes())


def test_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nowhere"):
        serialization.load(tmp_path / "nowhere")


# packing


def packed_by_hand(codes: list[int], bits: int) -> list[int]:
    """The codes as one long binary numeral, cut into bytes."""
    numeral = "".join(f"{code:0{bits}b}" for code in codes)
    numeral += "0" * (-len(numeral) % 8)
    return [int(numeral[i : i + 8], 2) for i in range(0, len(numeral), 8)]


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("shape", [(1,), (7,), (8,), (3, 5, 1, 3), (16, 3, 3, 3)])
def test_packing_is_the_binary_numeral(bits: int, shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(bits)
    codes = torch.randint(0, 2**bits, shape, generator=generator).to(torch.uint8)
    packed = pack(codes, bits)
    assert packed.tolist() == packed_by_hand(codes.flatten().tolist(), bits)
    assert torch.equal(unpack(packed, bits, shape), codes)


def test_unpacking_too_few_bytes_is_refused() -> None:
    with pytest.raises(ValueError, match="2 bytes cannot hold 7 codes of 3 bits"):
        unpack(torch.zeros(2, dtype=torch.uint8), 3, (7,))


def test_layers_that_are_not_quantized_are_named(tiny_unet: nn.Module) -> None:
    model: QuantizedNetwork = quantizable(tiny_unet, sites={"conv_in": LayerBits()})
    with pytest.raises(KeyError, match="conv_in"):
        model.layer("conv_in")

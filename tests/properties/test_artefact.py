"""The artefact of a quantized network: bit-equal when it is read, refused when it is damaged."""

import copy
import json
import math
import struct
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from tests.conftest import SCALES, TIMESTEPS, calibrated, example_inputs, quantizable
from tests.helpers.sampling import output
from tests.properties.test_surgery import ALL_STEPS, OPERANDS, mixed_bits
from tfmq_exp.denoisers.families.unet import attentions, set_heads
from tfmq_exp.denoisers.read_structure import read_structure
from tfmq_exp.surgery import serialization
from tfmq_exp.surgery.config import (
    AttentionBits,
    LayerBits,
)
from tfmq_exp.surgery.quantized_network import QuantizedNetwork
from tfmq_exp.surgery.stored_tensors import pack, unpack


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

"""Decoders quantized: numbers of a layer by hand, what reconstruction gains, and artefacts."""

from pathlib import Path
from typing import Any

import pytest
import torch
from hydra.utils import instantiate
from torch import Tensor

from tests.e2e.jobs import composed
from tests.helpers.components import KINDS, autoencoder, latents
from tests.helpers.reconstruction import MemoryCheckpointer, RecordedProgress, compute
from tfmq_exp.denoisers.denoiser import Denoiser
from tfmq_exp.denoisers.families.decoder import Decoder
from tfmq_exp.denoisers.loading.autoencoder import LatentDecoder
from tfmq_exp.methods.first_stage import DecoderCalibration, FirstStageBits
from tfmq_exp.surgery import serialization
from tfmq_exp.surgery.components import with_components
from tfmq_exp.surgery.quantized_network import QuantizedNetwork

QUICK = (
    "protocol.reconstruction.iterations=60",
    "protocol.reconstruction.batch_size=8",
    "protocol.calibration.images=24",
)


def method_of(name: str, folder: Path) -> Any:
    return instantiate(composed(folder, f"method={name}", *QUICK).method, _convert_="all")


def quantized(decoder: Decoder, z: Tensor, method: Any, weight: int = 4) -> QuantizedNetwork:
    calibration = DecoderCalibration(z, method, compute(), seed=0)
    return calibration.quantize(decoder, FirstStageBits("bits", weight, 8), MemoryCheckpointer(), RecordedProgress())


def error(model: QuantizedNetwork, decoder: Decoder, z: Tensor) -> float:
    with torch.no_grad():
        return float((model(z, 0).sample - decoder(z).sample).square().mean())


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("method", ["nearest", "tfmq_gptq"])
def test_an_artefact_gives_the_same_bits(name: str, method: str, tmp_path: Path) -> None:
    decoder, z = Decoder(autoencoder(name)), latents(name, 16)
    model = quantized(decoder, z, method_of(method, tmp_path))
    serialization.save(model, tmp_path / "decoder.safetensors")
    loaded = serialization.load(tmp_path / "decoder.safetensors")
    with torch.no_grad():
        assert torch.equal(loaded(z, 0).sample, model(z, 0).sample)
        assert not torch.equal(loaded(z, 0).sample, decoder(z).sample)
    assert not any("encoder" in key.split(".")[0] for key in loaded.network.state_dict())


def test_one_layer_is_what_its_formula_says(tmp_path: Path) -> None:
    """The second layer of a block with weights rounded to nearest: integers from its range, one range for its input."""
    decoder, z = Decoder(autoencoder("AutoencoderKL")), latents("AutoencoderKL", 12)
    model = quantized(decoder, z, method_of("nearest", tmp_path))
    name = "decoder.mid_block.resnets.0.conv2"
    layer, exact, seen = model.layer(name), decoder.get_submodule(name), list[tuple[Tensor, Tensor]]()
    layer.register_forward_hook(lambda _, args, output: seen.append((args[0], output)))
    with torch.no_grad():
        model(z, 0)
    (x, y) = seen[0]
    (integers,) = layer.quantized_weight()
    assert integers.codes.unique().numel() <= 16
    weight = (integers.codes.float() - integers.qparams.zero_point) * integers.qparams.scale
    # nearest: no code is nearer than half a step, but where the range that the observer chose clips
    off = (weight - exact.weight).abs() / integers.qparams.scale
    inside = (integers.codes > 0) & (integers.codes < 15)
    assert float(off[inside].max()) <= 0.5 + 1e-4
    state = {key.rpartition(".")[2]: value for key, value in layer.input_quantizer.state_dict().items()}
    codes = ((x / state["scale"]).round() + state["zero_point"]).clamp(0, 255)
    x_hat = (codes - state["zero_point"]) * state["scale"]
    assert torch.allclose(y, torch.nn.functional.conv2d(x_hat, weight, exact.bias, padding=1), atol=1e-5)


def test_reconstruction_lowers_the_error_of_images_that_it_has_not_seen(tmp_path: Path) -> None:
    decoder, learned, held_out = (
        Decoder(autoencoder("AutoencoderKL")),
        *(latents("AutoencoderKL", 24, s) for s in (1, 2)),
    )
    errors = {
        name: error(quantized(decoder, learned, method_of(name, tmp_path / name), weight=3), decoder, held_out)
        for name in ("nearest", "tfmq", "tfmq_gptq")
    }
    assert errors["tfmq"] < 0.8 * errors["nearest"]
    assert errors["tfmq_gptq"] < 0.8 * errors["nearest"]


def test_a_method_that_trains_rounds_to_nearest(tmp_path: Path) -> None:
    decoder, z = Decoder(autoencoder("AutoencoderTiny")), latents("AutoencoderTiny", 8)
    models = [quantized(decoder, z, method_of(name, tmp_path / name)) for name in ("lsq", "lsq_tdq")]
    for model in models:
        for name, parts in model.integers.items():
            exact = decoder.get_submodule(name).get_parameter("weight")
            assert float((parts[0].dequantize() - exact).abs().max() / parts[0].qparams.scale.max()) < 3


def denoiser_of(ae: Any) -> Denoiser:
    return Denoiser("tiny", torch.nn.Linear(1, 1), (4, 8, 8), {}, "", first_stage=LatentDecoder(ae, 0.5, rows=4))


@pytest.mark.bad_input
def test_a_first_stage_from_an_artefact_or_its_refusal(tmp_path: Path) -> None:
    ae, z, file = autoencoder("AutoencoderKL"), latents("AutoencoderKL", 8), tmp_path / "decoder.safetensors"
    model = quantized(Decoder(ae), z, method_of("nearest", tmp_path), weight=8)
    serialization.save(model, file)
    images = with_components(denoiser_of(ae), file).first_stage.decode(z)
    with torch.no_grad():
        assert torch.allclose(images, model(z / 0.5, 0).sample, atol=1e-5)  # batches of another size
    with pytest.raises(ValueError, match="with other settings than the model's AutoencoderKL"):
        with_components(denoiser_of(autoencoder("AutoencoderKL", layers_per_block=2)), file)
    with pytest.raises(ValueError, match="tiny has no text encoder 'text_encoder': it has none"):
        with_components(denoiser_of(ae), text_encoders={"text_encoder": file})
    damaged = bytearray(file.read_bytes())
    damaged[-40] ^= 1
    file.write_bytes(damaged)
    with pytest.raises(ValueError, match="is damaged: its content does not match its checksum"):
        with_components(denoiser_of(ae), file)

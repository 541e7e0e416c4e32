"""Folders of diffusers' layout give the same outputs as the original checkpoints they were made from."""

import functools
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, UNet2DModel, VQModel
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.helpers.originals import caption, read_original
from tfmq_exp.denoisers.denoiser import Denoiser, Pixels
from tfmq_exp.denoisers.loading.pretrained import load_denoiser

TOLERANCE = 3e-5


def saved(name: str, folder: Path, tokenizer: Path | None = None, pickled: bool = False) -> Denoiser:
    """Write the folder of a stored network; returns the denoiser of the original file."""
    original = read_original(name)
    denoiser = load_denoiser(name, original.save(folder.parent / "model.ckpt"), original.config, False, tokenizer)
    stage: Any = denoiser.first_stage
    encoder: Any = denoiser.encoder
    index: dict[str, Any] = {
        "_class_name": "SomePipeline",
        "unet": ["diffusers", "UNet"],
        "safety_checker": [None, None],
    }
    denoiser.network.save_pretrained(folder / "unet", safe_serialization=not pickled)  # type: ignore[operator]
    if not isinstance(stage, Pixels):
        part = "vae" if "encoded_moments" in original.recorded else "vqvae"
        stage.autoencoder.save_pretrained(folder / part, safe_serialization=not pickled)
        index[part] = ["diffusers", "Autoencoder"]
    if tokenizer is not None:
        encoder.model.save_pretrained(folder / "text_encoder")
        shutil.copytree(tokenizer, folder / "tokenizer")
        index["text_encoder"] = ["transformers", "CLIPTextModel"]
    DDIMScheduler(**denoiser.schedule).save_pretrained(folder / "scheduler")
    (folder / "model_index.json").write_text(json.dumps(index))
    return denoiser


def noise(denoiser: Denoiser, recorded: dict[str, Tensor]) -> Tensor:
    captions = [caption(ids) for ids in recorded.get("input_ids", ())]
    with torch.no_grad():
        return denoiser.network(recorded["x"], recorded["t"], **denoiser.encoder(captions).given).sample


def edit(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.mark.parametrize("name", ["ddim_cifar10", "ldm_lsun_beds", "ldm_lsun_churches", "sd_v1"])
def test_a_folder_gives_the_outputs_of_the_original(name: str, tmp_path: Path, tokenizer: Path) -> None:
    original = read_original(name)
    folder = tmp_path / "model"
    expected = saved(name, folder, tokenizer if name == "sd_v1" else None)
    config = original.config if name == "ldm_lsun_churches" else None
    state = torch.get_rng_state()
    found = load_denoiser(name, folder, config, False)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(noise(found, original.recorded), noise(expected, original.recorded))
    if "z" in original.recorded:
        z = original.recorded["z"]
        assert torch.equal(found.first_stage.decode(z), expected.first_stage.decode(z))
    assert found.schedule == expected.schedule
    assert found.settings["ema"] is False
    assert not any(parameter.requires_grad for parameter in found.network.parameters())
    assert not found.network.training


def test_heads_come_from_the_architecture(tmp_path: Path) -> None:
    original = read_original("ldm_lsun_churches")
    folder = tmp_path / "model"
    saved("ldm_lsun_churches", folder)
    alone = load_denoiser("x", folder, None, False)
    assert (noise(alone, original.recorded) - original.recorded["eps"]).abs().max() > 1000 * TOLERANCE
    told = load_denoiser("x", folder, original.config, False)
    torch.testing.assert_close(noise(told, original.recorded), original.recorded["eps"], atol=TOLERANCE, rtol=0)
    assert told.settings != alone.settings
    with pytest.raises(ValueError, match=r"model: the UNet in the folder is not the one of `config`: \d+ missing"):
        load_denoiser("x", folder, read_original("ldm_lsun_beds").config, False)


def test_a_folder_of_one_network(tmp_path: Path) -> None:
    """As google/ddpm-cifar10-32: all files side by side."""
    folder = tmp_path / "model"
    expected = saved("ddim_cifar10", folder)
    for file in (*(folder / "unet").iterdir(), folder / "scheduler" / "scheduler_config.json"):
        file.rename(folder / file.name)
    (folder / "unet").rmdir()
    found = load_denoiser("ddim_cifar10", folder, None, False)
    recorded = read_original("ddim_cifar10").recorded
    assert torch.equal(noise(found, recorded), noise(expected, recorded))
    assert (found.sample_shape, found.schedule) == (expected.sample_shape, expected.schedule)
    (folder / "scheduler_config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"no scheduler/scheduler_config\.json in"):
        load_denoiser("ddim_cifar10", folder, None, False)
    config = read_original("ddim_cifar10").config
    assert load_denoiser("ddim_cifar10", folder, config, False).schedule == expected.schedule


def test_each_network_is_built_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "model"
    saved("ldm_lsun_beds", folder)
    built: list[type] = []

    def counted(kind: Any) -> Any:
        @functools.wraps(kind.__init__)
        def init(self: Any, *args: Any, made: Any = kind.__init__, **options: Any) -> None:
            built.append(kind)
            made(self, *args, **options)

        return init

    for kind in (UNet2DModel, VQModel):
        monkeypatch.setattr(kind, "__init__", counted(kind))
    load_denoiser("x", folder, None, False)
    assert built == [UNet2DModel, VQModel]


def test_what_identifies_a_folder(tmp_path: Path) -> None:
    """Its weights and configurations, wherever it lies."""
    folder = tmp_path / "model"
    saved("ldm_lsun_beds", folder)
    first = load_denoiser("x", folder, None, False)
    moved = load_denoiser("x", folder.rename(tmp_path / "moved"), None, False, sha256=first.weights_sha256)
    assert (moved.weights_sha256, moved.settings) == (first.weights_sha256, first.settings)
    folder = tmp_path / "moved"
    (folder / "unet" / "diffusion_pytorch_model.fp16.safetensors").write_bytes(b"not read")
    assert load_denoiser("x", folder, None, False).weights_sha256 == first.weights_sha256
    edit(folder / "vqvae" / "config.json", scaling_factor=0.5)
    changed = load_denoiser("x", folder, None, False)
    assert changed.settings != first.settings
    assert changed.weights_sha256 == first.weights_sha256
    weights = folder / "vqvae" / "diffusion_pytorch_model.safetensors"
    save_file({name: value + 1 for name, value in load_file(weights).items()}, weights, {"format": "pt"})
    with pytest.raises(ValueError, match=f"has sha256 .* expected {first.weights_sha256}"):
        load_denoiser("x", folder, None, False, sha256=first.weights_sha256)


def test_vq_models_are_not_scaled_unless_they_say_so(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    saved("ldm_lsun_beds", folder)
    file = folder / "vqvae" / "config.json"
    config = json.loads(file.read_text())
    del config["scaling_factor"]
    file.write_text(json.dumps(config))
    stage: Any = load_denoiser("x", folder, None, False).first_stage
    assert stage.scale == 1.0  # diffusers' default is Stable Diffusion's


class Evil:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return exec, (f"open({str(self.marker)!r}, 'w').close()",)


def test_pickled_weights(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    expected = saved("ldm_lsun_beds", folder, pickled=True)
    file = folder / "unet" / "diffusion_pytorch_model.bin"
    assert file.is_file()
    recorded = read_original("ldm_lsun_beds").recorded
    assert torch.equal(noise(load_denoiser("x", folder, None, False), recorded), noise(expected, recorded))
    torch.save({"conv_in.weight": Evil(tmp_path / "marker")}, file)
    with pytest.raises(ValueError, match=r"diffusion_pytorch_model\.bin: refuses to load 'builtins\.exec'"):
        load_denoiser("x", folder, None, False)
    assert not (tmp_path / "marker").exists()


def test_folders_that_do_not_fit(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    saved("ldm_lsun_beds", folder)
    network, scheduler = folder / "unet" / "config.json", folder / "scheduler" / "scheduler_config.json"
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"

    def refusal(kind: type[Exception] = ValueError) -> str:
        with pytest.raises(kind, match=r"\S") as caught:
            load_denoiser("x", folder, None, False)
        assert str(folder) in str(caught.value)
        return str(caught.value)

    content, tensors = weights.read_bytes(), load_file(weights)
    bias = tensors.pop("conv_out.bias")
    save_file(tensors, weights, {"format": "pt"})
    assert "unet cannot be loaded: the weights do not fit the architecture: 1 missing, first conv_out.bias" in refusal()
    save_file(tensors | {"conv_out.bias": bias, "more": bias.clone()}, weights, {"format": "pt"})
    assert "1 not in the architecture, first more" in refusal()
    for kind in (torch.int8, torch.uint8, torch.int64, torch.bool, torch.complex64):
        save_file(tensors | {"conv_out.bias": bias.to(kind)}, weights, {"format": "pt"})
        name = str(kind).removeprefix("torch.")
        assert f"1 weights are no floating point numbers, first conv_out.bias ({name})" in refusal()
    weights.write_bytes(content[:-100])
    assert f"is truncated: it begins as safetensors of {len(content)} bytes and has {len(content) - 100}" in refusal()
    weights.unlink()
    assert "unet: expected diffusion_pytorch_model.safetensors or " in refusal(FileNotFoundError)
    weights.write_bytes(content)

    good = scheduler.read_text()
    edit(scheduler, trained_betas=[0.1])
    assert "trained_betas must be 1000 numbers" in refusal()
    scheduler.write_text(good)
    edit(scheduler, prediction_type="v_prediction", rescale_betas_zero_snr=True)
    found = load_denoiser("x", folder, None, False).schedule
    assert (found["prediction_type"], found["rescale_betas_zero_snr"]) == ("v_prediction", True)
    scheduler.write_text(good)
    good = network.read_text()
    edit(network, _class_name="UNet3DConditionModel")
    assert "of class UNet3DConditionModel; expected UNet2DModel or UNet2DConditionModel" in refusal()
    network.write_text("{")
    assert "config.json is damaged" in refusal()
    network.write_text(good)
    (folder / "vqvae").rename(folder / "other")
    assert "lacks the folder vqvae/, which its model_index.json lists" in refusal(FileNotFoundError)
    (folder / "model_index.json").rename(folder / "index.json")
    assert "other holds an autoencoder; expected it in vqvae/ or vae/" in refusal()  # latents would pass for pixels
    (folder / "index.json").rename(folder / "model_index.json")
    (folder / "other").rename(folder / "vqvae")
    with pytest.raises(ValueError, match="set ema=false"):
        load_denoiser("x", folder, None, True)
    network.unlink()
    assert "no config.json in" in refusal(FileNotFoundError)
    (folder / "unet").rename(folder / "transformer")
    assert "there is model_index.json, scheduler/, transformer/, vqvae/" in refusal(FileNotFoundError)


def test_former_names_of_layers(tmp_path: Path) -> None:
    """Autoencoders that diffusers saved before its attention had today's names."""
    folder = tmp_path / "model"
    saved("ldm_lsun_beds", folder)
    weights = folder / "vqvae" / "diffusion_pytorch_model.safetensors"
    now = load_denoiser("x", folder, None, False).first_stage
    former = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    state = load_file(weights)
    renamed = {re.sub(r"to_q|to_k|to_v|to_out\.0", lambda m: former[m[0]], name): x for name, x in state.items()}
    assert renamed.keys() != state.keys()
    save_file(renamed, weights, {"format": "pt"})
    then = load_denoiser("x", folder, None, False).first_stage
    z = read_original("ldm_lsun_beds").recorded["z"]
    assert torch.equal(then.decode(z), now.decode(z))


def test_a_text_model_and_its_words_are_needed(tmp_path: Path, tokenizer: Path) -> None:
    folder = tmp_path / "model"
    saved("sd_v1", folder, tokenizer)
    shutil.rmtree(folder / "tokenizer")
    with pytest.raises(FileNotFoundError, match=r"vocab\.json and merges\.txt in the folder .*model/tokenizer"):
        load_denoiser("x", folder, None, False)
    load_denoiser("x", folder, None, False, tokenizer)
    shutil.rmtree(folder / "text_encoder")
    (folder / "model_index.json").unlink()
    with pytest.raises(FileNotFoundError, match="no text_encoder/ in"):
        load_denoiser("x", folder, None, False, tokenizer)


def test_conditions_inside_the_unet_are_not_supported(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    saved("ddim_cifar10", folder)
    edit(folder / "unet" / "config.json", num_class_embeds=10)
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    save_file(load_file(weights) | {"class_embedding.weight": torch.zeros(10, 128)}, weights, {"format": "pt"})
    with pytest.raises(ValueError, match=r"unet/config\.json: a UNet with num_class_embeds=10 is not supported"):
        load_denoiser("x", folder, None, False)

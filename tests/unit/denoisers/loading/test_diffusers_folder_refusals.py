"""Folders of diffusers' layout that do not fit, or name programs."""

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.helpers.originals import read_original
from tests.unit.denoisers.loading.test_diffusers_folder import edit, noise, saved
from tfmq_exp.denoisers.loading.pretrained import load_denoiser


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

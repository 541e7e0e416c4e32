"""Folders of diffusers' layout give the same outputs as the original checkpoints they were made from."""

import functools
import json
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

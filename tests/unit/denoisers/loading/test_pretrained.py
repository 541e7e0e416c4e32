"""Original checkpoints, loaded whole, give the outputs of the original programs, or an error that says what is wrong."""

import copy
import hashlib
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import save_file
from torch import Tensor

from tests.helpers.originals import Original, caption, read_original
from tfmq_exp.denoisers.denoiser import Denoiser, NoConditions, Pixels
from tfmq_exp.denoisers.loading import checkpoint
from tfmq_exp.denoisers.loading.autoencoder import LatentDecoder
from tfmq_exp.denoisers.loading.pretrained import load_denoiser

TOLERANCE = 3e-5  # float32 rounding in another order of operations; the goldens' own README
LATENT = ["ldm_cin256_v2", "ldm_lsun_beds", "ldm_lsun_churches", "ldm_celeba", "ldm_ffhq_ema", "sd_v1"]


def close(output: Tensor, recorded: Tensor) -> None:
    torch.testing.assert_close(output, recorded, atol=TOLERANCE, rtol=0)


def loaded(name: str, folder: Path, tokenizer: Path | None = None, ema: bool = False) -> tuple[Denoiser, Original]:
    original = read_original(name)
    path = original.save(folder / "model.ckpt")
    return load_denoiser(name, path, original.config, ema, tokenizer), original


def choices(recorded: dict[str, Tensor]) -> list[Any]:
    """The labels or captions that were recorded."""
    if "class_ids" in recorded:
        return recorded["class_ids"].tolist()
    return [caption(ids) for ids in recorded.get("input_ids", ())]


@pytest.mark.parametrize("name", ["ddim_cifar10", *LATENT])
def test_a_checkpoint_gives_the_original_outputs(name: str, tmp_path: Path, tokenizer: Path) -> None:
    state = torch.get_rng_state()
    denoiser, (_, _, recorded) = loaded(name, tmp_path, tokenizer)
    assert torch.equal(torch.get_rng_state(), state)
    conditions = denoiser.encoder(choices(recorded))
    if "context" in recorded:
        close(conditions.given["encoder_hidden_states"], recorded["context"])
        close(conditions.null["encoder_hidden_states"], recorded["uncond_context"][:1])
    else:
        assert isinstance(denoiser.encoder, NoConditions)
    for x, eps in (("x", "eps"), ("x_small", "eps_x_small")):
        with torch.no_grad():
            close(denoiser.network(recorded[x], recorded["t"], **conditions.given).sample, recorded[eps])
    with torch.no_grad():
        assert denoiser.network(**denoiser.example()).sample.shape == (1, *denoiser.sample_shape)


@pytest.mark.parametrize("name", LATENT)
def test_first_stages_give_the_original_images(name: str, tmp_path: Path, tokenizer: Path) -> None:
    denoiser, (_, _, recorded) = loaded(name, tmp_path, tokenizer)
    stage = denoiser.first_stage
    assert isinstance(stage, LatentDecoder)
    assert stage.scale == pytest.approx(float(recorded["scale_factor"]), rel=1e-12)
    close(stage.decode(recorded["z"]), recorded["decoded"])
    latents = stage.encode(recorded["image_in"]) / stage.scale
    if "encoded_moments" in recorded:
        close(latents, recorded["encoded_moments"].chunk(2, dim=1)[0])
    else:
        close(latents, recorded["encoded_prequant"])
        *_, indices = stage.autoencoder.quantize(recorded["z"])[2]
        assert torch.equal(indices.flatten(), recorded["vq_indices"].flatten())


def test_averages_of_the_weights(tmp_path: Path) -> None:
    denoiser, (_, _, recorded) = loaded("ldm_ffhq_ema", tmp_path, ema=True)
    with torch.no_grad():
        close(denoiser.network(recorded["x"], recorded["t"]).sample, recorded["eps_ema"])
    assert (recorded["eps_ema"] - recorded["eps"]).abs().max() > 100 * TOLERANCE
    assert denoiser.settings["ema"] is True


def test_what_identifies_a_denoiser(tmp_path: Path) -> None:
    denoiser, original = loaded("ldm_lsun_churches", tmp_path)
    path = tmp_path / "model.ckpt"
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    assert denoiser.weights_sha256 == sha256
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(original.config))
    again = load_denoiser("x", str(path), str(tmp_path / "config.yaml"), False, sha256=sha256.upper())
    assert again.settings == denoiser.settings
    other = copy.deepcopy(original.config)
    other["model"]["params"]["image_size"] = 32
    changed = load_denoiser("x", path, other, False)
    assert changed.settings["architecture_sha256"] != denoiser.settings["architecture_sha256"]
    assert (denoiser.sample_shape, changed.sample_shape) == ((4, 16, 16), (4, 32, 32))
    assert denoiser.name == "ldm_lsun_churches"
    assert denoiser.schedule == {
        "num_train_timesteps": 1000,
        "beta_start": 0.0015,
        "beta_end": 0.0155,
        "beta_schedule": "scaled_linear",
    }


def test_files_of_the_ddim_program(tmp_path: Path) -> None:
    """A bare state dict, as published; and the list that its training writes, with averages and DataParallel's prefix."""
    config, state, recorded = read_original("ddim_cifar10")
    torch.save(state, tmp_path / "bare.ckpt")
    save_file(state, tmp_path / "bare.safetensors")
    last = {f"module.{name}": torch.zeros_like(value) for name, value in state.items()}
    torch.save([last, {"state": {}}, 3, 1000, state], tmp_path / "list.pth")
    for file, ema in (("bare.ckpt", False), ("bare.safetensors", False), ("list.pth", True)):
        denoiser = load_denoiser("ddim_cifar10", tmp_path / file, config, ema)
        with torch.no_grad():
            close(denoiser.network(recorded["x"], recorded["t"]).sample, recorded["eps"])
    assert isinstance(denoiser.first_stage, Pixels)
    assert denoiser.schedule == {
        "num_train_timesteps": 1000,
        "beta_start": 0.0001,
        "beta_end": 0.02,
        "beta_schedule": "linear",
    }


def test_networks_are_float32_and_fixed(tmp_path: Path, tokenizer: Path) -> None:
    original = read_original("sd_v1")
    half = original._replace(state={name: value.half() for name, value in original.state.items()})
    denoiser = load_denoiser("sd", half.save(tmp_path / "half.ckpt"), half.config, False, tokenizer)
    encoder: Any = denoiser.encoder
    stage: Any = denoiser.first_stage
    for network in (denoiser.network, stage.autoencoder, encoder.model):
        assert not any(module.training for module in network.modules())
        for parameter in network.parameters():
            assert parameter.dtype is torch.float32
            assert not parameter.requires_grad
        assert not any(tensor.is_meta for tensor in (*network.parameters(), *network.buffers()))


def test_what_is_not_needed_is_not_kept(tmp_path: Path) -> None:
    """Averages, losses, schedules and optimizer states may be anything at all."""
    original = read_original("ldm_ffhq_ema")
    kept = {name: value for name, value in original.state.items() if not name.startswith("model_ema.")}
    kept |= {"first_stage_model.loss.discriminator.weight": torch.zeros(3), "posterior_variance": torch.zeros(7)}
    path = tmp_path / "model.ckpt"
    torch.save({"state_dict": kept, "optimizer_states": [torch.zeros(10)], "callbacks": {}}, path)
    denoiser = load_denoiser("ldm_ffhq", path, original.config, False)
    with torch.no_grad():
        output = denoiser.network(original.recorded["x"], original.recorded["t"]).sample
    close(output, original.recorded["eps"])


@pytest.mark.parametrize("ema", [False, True])
def test_a_checkpoint_is_opened_once(ema: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []
    opener = checkpoint.open_torch
    monkeypatch.setattr(checkpoint, "open_torch", lambda file: calls.append(file) or opener(file))
    loaded("ldm_ffhq_ema", tmp_path, ema=ema)
    assert len(calls) == 1
    assert calls[0].closed

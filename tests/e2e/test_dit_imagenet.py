"""DiT by class from an original checkpoint: the original's trajectories, and a quantized network through its file."""

import json
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file

from tests.helpers.transformers import GOLDENS, cast
from tfmq_exp import api
from tfmq_exp.denoisers.denoiser import Denoiser
from tfmq_exp.denoisers.loading.original_dit import load_original_dit
from tfmq_exp.sampling import ancestral
from tfmq_exp.sampling.ancestral import DDPM
from tfmq_exp.sampling.guidance import Sampling
from tfmq_exp.sampling.trajectory import trajectory

CASE: dict[str, Any] = json.loads((GOLDENS / "dit/index.json").read_text(encoding="utf-8"))["b"]
RECORDED = load_file(GOLDENS / "dit/b.io.safetensors")
STAGE = GOLDENS / "pipelines/dit/vae"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny checkpoint of the original layout: bare weights of torch.save."""
    path = tmp_path_factory.mktemp("dit") / "DiT-tiny.pt"
    torch.save(cast(load_file(GOLDENS / "dit/b.model.safetensors"), torch.float32), path)
    return path


@pytest.fixture(scope="module")
def tiny(checkpoint: Path) -> Denoiser:
    return load_original_dit(checkpoint, STAGE, arguments=CASE["constructor"])


def test_guided_trajectories_are_the_originals(tiny: Denoiser) -> None:
    golden, sampler = RECORDED["e2e.ddpm_10.traj"], DDPM(10)
    sampling = Sampling(sampler, guidance=CASE["runs"]["ddpm_10"]["cfg"])
    given, noise = tiny.encoder(RECORDED["e2e.ddpm_10.y"].tolist()), iter(RECORDED["e2e.ddpm_10.noise"])
    with patch.object(ancestral, "row_noise", lambda like, _: next(noise).to(like)):
        steps = trajectory(sampling.predictor(tiny.network), sampler, tiny.schedule, golden[0], [], given)
        path = torch.stack([golden[0], *(step.x_next for step in steps)])
    assert (path - golden).abs().max() <= 2e-6 * golden.abs().max()


def overrides(checkpoint: Path) -> list[str]:
    arguments = json.dumps(CASE["constructor"]).replace('"', "")
    return [
        *(f"path={checkpoint}", f"model.denoiser.autoencoder={STAGE}", f"+model.denoiser.arguments={arguments}"),
        *("model.sampling.conditioning.count=7", "debug=smoke", "runtime.threads=1"),
    ]


def test_a_run_of_its_configuration_is_stored_with_its_sampler_and_guidance(checkpoint: Path, tmp_path: Path) -> None:
    denoiser = api.load_denoiser("dit_imagenet", *overrides(checkpoint))
    assert denoiser.image_shape()[0] == 3
    model = api.quantize(denoiser, method="nearest", overrides=overrides(checkpoint), progress=False)
    model.save(tmp_path / "model.safetensors")
    loaded, given = api.load_quantized(tmp_path / "model.safetensors"), denoiser.encoder([3, 5])
    images, again = (api.sample(one, range(2), conditions=given) for one in (model, loaded))
    assert torch.equal(images, again)
    assert images.isfinite().all()
    assert loaded.recipe is not None
    assert loaded.recipe.sampling.sampler == DDPM(4)
    assert loaded.recipe.sampling.guidance == 1.5


@pytest.mark.bad_input
def test_what_is_missing_or_does_not_fit_is_named(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no weights of dit_imagenet at .*: expected DiT-XL-2-256x256\.pt"):
        load_original_dit(tmp_path / "DiT-XL-2-256x256.pt", STAGE)
    with pytest.raises(FileNotFoundError, match=r"no config\.json in .*: expected the folder of an AutoencoderKL"):
        load_original_dit(checkpoint, tmp_path, arguments=CASE["constructor"])
    with pytest.raises(ValueError, match="2 blocks instead of depth=28"):
        load_original_dit(checkpoint, STAGE)
    AutoencoderKL(latent_channels=3, block_out_channels=(8,), norm_num_groups=4).save_pretrained(tmp_path / "vae")
    with pytest.raises(ValueError, match=r"latents have 3 channels, and .* takes 4"):
        load_original_dit(checkpoint, tmp_path / "vae", arguments=CASE["constructor"])

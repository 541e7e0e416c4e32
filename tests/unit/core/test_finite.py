"""A NaN or an infinity is told where it arises: in an extractor's weights, activations, losses, noise, images, features and scores."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from tests.helpers.inception import random_weights
from tfmq_exp.core.finite import NotFiniteError, require_finite, within
from tfmq_exp.denoisers.denoiser import Conditions, Denoiser, NoConditions
from tfmq_exp.denoisers.loading.autoencoder import LatentDecoder
from tfmq_exp.evaluation.features import load_inception
from tfmq_exp.sampling.guidance import Sampling
from tfmq_exp.sampling.images import ImagePlan, sample_shard, to_uint8
from tfmq_exp.sampling.samplers import DDIM

pytestmark = pytest.mark.bad_input

SCHEDULE = {"num_train_timesteps": 1000, "beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02}
WRONG = [math.nan, math.inf, -math.inf]


def test_a_message_counts_what_is_wrong() -> None:
    x = torch.tensor([1.0, math.nan, math.inf, -math.inf])
    with pytest.raises(NotFiniteError, match=r"^x is not finite: 1 NaN and 2 infinite of 4 values$"):
        require_finite(x, "x")
    for fine in (torch.ones(3), torch.zeros(0), torch.tensor([2**40]), torch.ones(2, dtype=torch.bfloat16)):
        assert require_finite(fine, "x") is fine
    with pytest.raises(NotFiniteError, match=r"^step 3: x is not finite"), within("step 3"):
        require_finite(x, "x")


@pytest.mark.parametrize("name", ["fc.weight", "Conv2d_1a_3x3.bn.running_var", "Mixed_7c.branch1x1.conv.weight"])
def test_inception(name: str, tmp_path: Path) -> None:
    tensors = random_weights(0)
    tensors[name].view(-1)[0] = math.inf
    save_file(tensors, tmp_path / "inception.safetensors")
    with pytest.raises(ValueError, match=rf"inception\.safetensors: the weights: {name} is not finite"):
        load_inception(tmp_path / "inception.safetensors")


@pytest.mark.parametrize("scale", [0.0, -1.0, *WRONG, "0.18", True])
def test_the_scale_of_latents(scale: Any) -> None:
    with pytest.raises(ValueError, match=r"scale factor must be a number above 0, got"):
        LatentDecoder(nn.Identity(), scale)  # type: ignore[arg-type]


def denoiser(network: nn.Module, **parts: Any) -> Denoiser:
    return Denoiser("tiny", network, (3, 8, 8), SCHEDULE, "0" * 64, **parts)


@pytest.mark.parametrize("value", WRONG)
@pytest.mark.parametrize("call", [0, 2, 3])
def test_a_networks_output_at_a_step(tiny_unet: nn.Module, value: float, call: int) -> None:
    sampling, seen = Sampling(DDIM(4)), [0]

    def predict(x: Tensor, t: Tensor, conditions: Conditions) -> Tensor:
        eps = 0.1 * x
        if seen[0] == call:
            eps[1, 0, 0, 0] = value
        seen[0] += 1
        return eps

    t = sampling.calls(denoiser(tiny_unet))[call]
    with pytest.raises(NotFiniteError, match=rf"network's output at step {call + 1}, timestep {t} is not finite: 1 "):
        sample_shard(predict, denoiser(tiny_unet), sampling, ImagePlan(2, 0, 2), range(2))


def test_what_a_sampler_makes_of_it(tiny_unet: nn.Module) -> None:
    def predict(x: Tensor, t: Tensor, conditions: Conditions) -> Tensor:
        return torch.full_like(x, 3e38)

    with pytest.raises(NotFiniteError, match=r"what the sampler makes of .* at step 1"):
        sample_shard(predict, denoiser(tiny_unet), Sampling(DDIM(4)), ImagePlan(2, 0, 2), range(2))


def test_float16_that_overflows_is_told_what_helps(tiny_unet: nn.Module) -> None:
    def predict(x: Tensor, t: Tensor, conditions: Conditions) -> Tensor:
        return (1e6 * x).half().float()

    sampling = Sampling(DDIM(4), precision="float16")
    with pytest.raises(NotFiniteError, match=r"step 1.*set model\.sampling\.precision to bfloat16 or float32"):
        list(sampling.trajectory(predict, denoiser(tiny_unet), seed=0, stream="images", indices=range(2)))


@pytest.mark.parametrize("value", WRONG)
@pytest.mark.parametrize("rule", ["round", "truncate"])
def test_no_image_has_a_byte_for_it(value: float, rule: Any) -> None:
    with pytest.raises(NotFiniteError, match="images that the first stage returns"):
        to_uint8(torch.tensor([0.0, value]), rule)


def test_a_decoders_output(tiny_unet: nn.Module) -> None:
    class Broken:
        def decode(self, x: Tensor) -> Tensor:
            return x / 0 * 0

    plan = ImagePlan(1, 0, 1)
    with pytest.raises(NotFiniteError, match="images that the first stage returns"):
        sample_shard(
            lambda x, _t, _c: 0.1 * x, denoiser(tiny_unet, first_stage=Broken()), Sampling(DDIM(2)), plan, range(1)
        )


def test_a_condition(tiny_unet: nn.Module) -> None:
    class Broken(NoConditions):
        def __call__(self, choices: Any) -> Conditions:
            return Conditions({"encoder_hidden_states": torch.full((2, 5, 12), math.nan)})

    with pytest.raises(NotFiniteError, match="the condition encoder_hidden_states is not finite"):
        Sampling(DDIM(2)).conditions(denoiser(tiny_unet, encoder=Broken()), 0, "images", [0, 1])

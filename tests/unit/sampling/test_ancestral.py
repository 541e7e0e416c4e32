"""DDPM on respaced timesteps against the original's trajectories, and its variances against the formula."""

import json
from typing import Any
from unittest.mock import patch

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.helpers.transformers import GOLDENS, cast
from tfmq_exp.denoisers.denoiser import Conditions
from tfmq_exp.denoisers.originals.dit_checkpoint import load_dit
from tfmq_exp.sampling import ancestral
from tfmq_exp.sampling.ancestral import DDPM
from tfmq_exp.sampling.samplers import DDIM
from tfmq_exp.sampling.trajectory import trajectory

INDEX = json.loads((GOLDENS / "dit/index.json").read_text(encoding="utf-8"))
SCHEDULE = {"num_train_timesteps": 1000, "beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear"}


@pytest.mark.parametrize("respacing", INDEX["timestep_lists"])
def test_timesteps_are_the_originals(respacing: str) -> None:
    count = int(respacing.removeprefix("ddim"))
    uniform = respacing.startswith("ddim")
    sampler = DDIM(count, steps_offset=0) if uniform else DDIM(count, timestep_spacing="ends", steps_offset=0)
    assert list(sampler.calls(SCHEDULE)) == INDEX["timestep_lists"][respacing]
    if not uniform:
        assert DDPM(count).calls(SCHEDULE) == sampler.calls(SCHEDULE)


@pytest.mark.parametrize(("name", "variance"), [("b", "learned"), ("c", "large")])
@pytest.mark.parametrize(("suffix", "tolerance"), [("", 2e-6), ("_f64", 1e-11)])
def test_trajectories_are_the_originals(name: str, variance: Any, suffix: str, tolerance: float) -> None:
    dtype = torch.float64 if suffix else torch.float32
    weights = cast(load_file(GOLDENS / f"dit/{name}.model.safetensors"), torch.float32)
    network = torch.nn.Module.to(load_dit(INDEX[name]["constructor"], weights), dtype)
    recorded = load_file(GOLDENS / f"dit/{name}.io.safetensors")
    run, golden = INDEX[name]["runs"]["ddpm_10"], recorded[f"e2e.ddpm_10.traj{suffix}"]
    labels = recorded["e2e.ddpm_10.y"]

    def predict(x: Tensor, t: Tensor, _: Conditions) -> Tensor:
        """The original's guidance: of the first three channels."""
        with_class, without = (network(x, t, y).sample for y in (labels, torch.full_like(labels, len(network_classes))))
        guided = without + run["cfg"] * (with_class - without)
        return torch.cat([guided[:, :3], with_class[:, 3:]], dim=1)

    network_classes = range(INDEX[name]["constructor"]["num_classes"])
    noise = iter(recorded["e2e.ddpm_10.noise"])
    with patch.object(ancestral, "row_noise", lambda like, _: next(noise).to(like)):
        steps = trajectory(predict, DDPM(10, variance), SCHEDULE, golden[0], [], Conditions())
        path = torch.stack([golden[0], *(step.x_next for step in steps)])
    assert (path - golden).abs().max() <= tolerance * golden.abs().max()


@pytest.mark.parametrize("steps", [2, 7, 1000])
def test_every_step_has_the_posterior_of_its_formula(steps: int) -> None:
    """A slow oracle: mean and variance of q(x_s | x_t, x_0) by conditioning of Gaussians, number by number."""
    betas = [1e-4 + (0.02 - 1e-4) * i / 999 for i in range(1000)]
    kept, product = [], 1.0
    for beta in betas:
        product *= 1 - beta
        kept.append(product)
    sampler = DDPM(steps)
    calls = sampler.calls(SCHEDULE)
    x, eps = torch.tensor([[[[0.7]]]], dtype=torch.float64), torch.tensor(-0.4, dtype=torch.float64)
    for call in range(0, steps - 1, max(1, steps // 5)):
        a, b = kept[calls[call]], kept[calls[call + 1]]
        clean = (0.7 - (1 - a) ** 0.5 * -0.4) / a**0.5
        share = a / b  # x_t = sqrt(share) x_s + sqrt(1 - share) noise
        precision = share / (1 - share) + 1 / (1 - b)
        mean = (share**0.5 * 0.7 / (1 - share) + b**0.5 * clean / (1 - b)) / precision
        for weight, variance in ((-1.0, 1 / precision), (1.0, 1 - share)):
            output = torch.cat([eps.reshape(1, 1, 1, 1), torch.full_like(x, weight)], dim=1)
            with patch.object(ancestral, "row_noise", lambda like, _: torch.ones_like(like)):
                found = float(sampler.start(SCHEDULE).move(call, output, x, []))
            assert found == pytest.approx(mean + variance**0.5, rel=1e-9)


def test_an_output_without_variance_is_refused() -> None:
    x = torch.zeros(1, 4, 2, 2)
    with pytest.raises(ValueError, match="variance=learned: the network's output must have 8 channels, got 4"):
        DDPM(5).start(SCHEDULE).move(0, x, x, [torch.Generator()])


@pytest.mark.parametrize(
    ("settings", "named"),
    [({"num_inference_steps": 0}, "num_inference_steps"), ({"variance": "small"}, "learned, large")],
)
def test_wrong_settings_are_named(settings: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        DDPM(**{"num_inference_steps": 5, **settings})

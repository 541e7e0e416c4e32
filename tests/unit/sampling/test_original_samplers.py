"""Samplers and schedules against goldens of the original programs."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tfmq_exp.denoisers.denoiser import Conditions
from tfmq_exp.sampling import samplers as sampler_classes
from tfmq_exp.sampling.samplers import DDIM, PLMS
from tfmq_exp.sampling.trajectory import Sampler, Spacing, alphas_cumprod, trajectory

SCHEDULE = {"num_train_timesteps": 1000, "beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02}
NONE = Conditions()
GOLDENS = Path(__file__).parents[2] / "goldens" / "compvis"
CASES = json.loads((GOLDENS / "samplers.json").read_text())


def original(case: dict[str, Any]) -> tuple[Sampler, dict[str, Any]]:
    """The sampler and the schedule of a case."""
    ldm = case["kind"] != "ddim_generalized"
    schedule = {
        "num_train_timesteps": 1000,
        "beta_start": case["linear_start"] or 1e-4,
        "beta_end": case["linear_end"] or 0.02,
        "beta_schedule": "scaled_linear" if ldm else "linear",
    }
    spacing: Spacing = "uniform" if case["discretize"] == "uniform" else "quadratic"
    if case["kind"] == "ldm_plms":
        return PLMS(case["steps"]), schedule
    return DDIM(case["steps"], case["eta"], spacing, steps_offset=int(ldm), set_alpha_to_one=not ldm), schedule


def analytic(case: dict[str, Any], x: Tensor, t: Tensor) -> Tensor:
    """The prediction that a case was made with."""
    when = t.to(x).reshape(-1, 1, 1, 1)
    if case["eps"] == "lin":
        return 0.1 * x + 0.01 * when / 1000
    return 0.6 * x.tanh() + 0.3 * (when / 100).sin() * x.cos()


@pytest.mark.parametrize("case", CASES["cases"], ids=lambda case: case["id"])
@pytest.mark.parametrize(
    ("suffix", "dtype", "tolerance"), [("traj", torch.float32, 2e-6), ("traj_f64", torch.float64, 1e-12)]
)
def test_trajectories_are_those_of_the_original_programs(
    case: dict[str, Any], suffix: str, dtype: torch.dtype, tolerance: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    goldens = load_file(GOLDENS / "samplers.safetensors")
    wanted, noise = goldens[f"{case['id']}.{suffix}"], iter(goldens.get(f"{case['id']}.noise", ()))
    monkeypatch.setattr(sampler_classes, "row_noise", lambda like, _: next(noise).to(like))
    sampler, schedule = original(case)
    assert list(sampler.calls(schedule)) == case["model_call_timesteps"]
    x = goldens["x_T"].to(dtype)
    path = [
        x,
        *(step.x_next for step in trajectory(lambda x, t, _: analytic(case, x, t), sampler, schedule, x, [], NONE)),
    ]
    if isinstance(sampler, PLMS):
        del path[1]  # where the look-ahead stood
    assert (torch.stack(path) - wanted).abs().max() <= tolerance * wanted.abs().max()
    assert next(noise, None) is None


@pytest.mark.parametrize(("name", "calls"), CASES["timestep_lists_call_order"].items())
def test_timesteps_of_the_published_commands(name: str, calls: list[int]) -> None:
    number = int(re.findall(r"(?:-c|steps|timesteps|quad) (\d+)", name)[0])
    cifar = name.startswith("ddim_cifar10")
    spacing: Spacing = "quadratic" if "quad" in name else "uniform"
    assert list(DDIM(number, timestep_spacing=spacing, steps_offset=int(not cifar)).calls(SCHEDULE)) == calls


@pytest.mark.parametrize(
    ("name", "start", "end", "kind"),
    [
        ("lsun_beds_celeba_ffhq_cin256", 0.0015, 0.0195, "scaled_linear"),
        ("lsun_churches", 0.0015, 0.0155, "scaled_linear"),
        ("sd_v1", 0.00085, 0.012, "scaled_linear"),
        ("ddim_cifar10", 1e-4, 0.02, "linear"),
    ],
)
def test_noise_schedules_are_those_of_the_original_programs(name: str, start: float, end: float, kind: str) -> None:
    stored = load_file(GOLDENS / "schedules.safetensors")[f"{name}.alphas_cumprod"]
    schedule = {"num_train_timesteps": 1000, "beta_start": start, "beta_end": end, "beta_schedule": kind}
    rounding = 5e-7 if kind == "linear" else 2e-7  # DDIM's own program multiplies a thousand factors in float32
    torch.testing.assert_close(alphas_cumprod(schedule).float(), stored, rtol=rounding, atol=0)

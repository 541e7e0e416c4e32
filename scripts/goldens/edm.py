"""EDM's sampler and preconditioning against the original program's numbers, and diffusers' scheduler against them."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from unittest.mock import patch

import torch
from torch import Tensor

from goldens.comparing import ROUNDING, DamagedError, Group, Record, coverage, reading
from goldens.families import read_json, read_recorded
from tfmq_exp.denoisers.denoiser import Conditions
from tfmq_exp.denoisers.loading.scheduler_config import default_settings
from tfmq_exp.sampling import edm
from tfmq_exp.sampling.diffusers_scheduler import Scheduler
from tfmq_exp.sampling.edm import EDM, Preconditioning
from tfmq_exp.sampling.trajectory import Sampler, trajectory

DOUBLE, SINGLE = 1e-12, 5e-6  # relative; diffusers' sigmas and steps are float32
SIGMA_DATA = 0.5
SCHEDULE = {"num_train_timesteps": 1000, "prediction_type": "edm"}
# of the original program's general sampler, the variant that is EDM's
VARIANT = {"discretization": "edm", "schedule": "linear", "scaling": "none", "alpha": 1}
NAMES = {"sigma_min": "sigma_min", "sigma_max": "sigma_max", "rho": "rho", "solver": "solver"} | {
    f"S_{name}": f"s_{name}" for name in ("churn", "min", "max", "noise")
}


def sampler_of(case: Record) -> EDM:
    """Our sampler with the settings of a case; DamagedError for another sampler than EDM's."""
    if case["function"] not in ("edm_sampler", "ablation_sampler"):
        raise DamagedError(f"function must be edm_sampler or ablation_sampler, got {case['function']!r}")
    if other := [f"{key}={case[key]}" for key, value in VARIANT.items() if case.get(key, value) != value]:
        raise DamagedError(f"there is no sampler with {', '.join(other)}")
    return EDM(case["num_steps"], **{ours: case[theirs] for theirs, ours in NAMES.items() if theirs in case})


def denoised(x: Tensor, sigma: Tensor, means: Sequence[Tensor], s: float) -> Tensor:
    """The mean of clean samples given x, where these are of two normal distributions of standard deviation s."""
    first, second = means
    variance = s**2 + sigma**2
    distances = [(x - mean).square().flatten(1).sum(1).reshape(-1, *[1] * (x.dim() - 1)) for mean in means]
    w = torch.sigmoid((distances[0] - distances[1]) / (2 * variance))
    return ((1 - w) * (s**2 * x + sigma**2 * first) + w * (s**2 * x + sigma**2 * second)) / variance


def path_of(sampler: Sampler, sigmas: Tensor, latents: Tensor, recorded: Record, s: float) -> Tensor:
    """States at every call of the network, and the last; the network is that whose denoised sample is `denoised`."""
    means, factors = [recorded[f"analytic.m{i}"].double() for i in (0, 1)], Preconditioning.at(sigmas, SIGMA_DATA)
    calls = iter(zip(sigmas, *factors, strict=True))

    def predict(x: Tensor, _t: Tensor, _conditions: Conditions) -> Tensor:
        sigma, skip, out, scale, _ = next(calls)
        x = x.double() / scale
        return (denoised(x, sigma, means, s) - skip * x) / out

    start = latents * sampler.start(SCHEDULE).sigma
    steps = trajectory(predict, sampler, SCHEDULE, latents, [], Conditions())
    return torch.stack([start, *(step.x_next for step in steps)])


def trajectories(index: Record, recorded: Record) -> Iterator[Group]:
    """The original samplers around a denoiser that is a formula, with their noise."""
    sigmas, s = Group("edm: sigmas", DOUBLE), index["analytic"]["s"]
    latents = recorded["latents"].double()
    for name, case in index["trajectories"].items():
        sampler, golden = sampler_of(case), recorded[f"{name}.sigmas_of_calls"]
        sigmas.compare(sampler.sigmas / golden, torch.ones_like(golden))
        sigmas.compare(len(sampler.sigmas), case["calls"])
        states = torch.cat([recorded[f"{name}.x_of_calls"], recorded[f"{name}.final"][None]])
        noise = iter(recorded[f"{name}.noise"]) if f"{name}.noise" in recorded else iter(())
        with patch.object(edm, "row_noise", lambda like, _, noise=noise: next(noise).to(like)):
            path = path_of(sampler, sampler.sigmas, latents, recorded, s)
        yield compared(f"edm: {name}", DOUBLE, path, states)
        if sampler.solver == "euler" and not sampler.s_churn:
            yield compared(f"edm: {name}, diffusers", SINGLE, by_diffusers(sampler, case, latents, recorded, s), states)
    yield sigmas


def by_diffusers(sampler: EDM, case: Record, latents: Tensor, recorded: Record, s: float) -> Tensor:
    """The same path by diffusers' scheduler, which starts from noise of another size."""
    names = ("sigma_min", "sigma_max", "rho")
    settings = default_settings("EDMEulerScheduler") | {name: float(getattr(sampler, name)) for name in names}
    theirs = Scheduler("EDMEulerScheduler", settings, case["num_steps"])
    latents = latents * (sampler.sigma_max / theirs.start(SCHEDULE).sigma)
    return path_of(theirs, theirs.scheduler().sigmas[:-1].double(), latents, recorded, s)


def compared(name: str, tolerance: float, ours: Tensor, golden: Tensor) -> Group:
    """One trajectory, each state relative to its own largest value."""
    group = Group(name, tolerance)
    for a, b in zip(ours, golden, strict=True):
        group.compare(a, b)
    return group


def preconditioning(recorded: Record, group: Group) -> None:
    """The factors around a network, from its own recorded input and output."""
    sigma, x = recorded["sigma"], recorded["x"]
    factors = Preconditioning.at(sigma, SIGMA_DATA)
    skip, out, scale = (factor.reshape(-1, *[1] * (x.dim() - 1)) for factor in factors[:3])
    group.compare(scale * x, recorded["network_input"])
    group.compare(factors.noise, recorded["c_noise"])
    group.compare(skip * x + out * recorded["F"], recorded["D"])


def check_edm(folder: Path) -> list[Group]:
    """Every comparison of a folder of the `edm` layout: samplers, and the factors around the networks, which have no place here.

    Raises:
        DamagedError: something is missing or cannot be read.
    """
    index, recorded = read_json(folder / "index.json"), read_recorded(folder / "samplers.safetensors")
    with reading(folder):
        groups = list(trajectories(index, recorded))
        factors = Group("edm: preconditioning", ROUNDING)
        for name in index["networks"]:
            if (file := folder / f"{name}.io.safetensors").is_file():
                preconditioning(read_recorded(file), factors)
    groups += [factors] if factors.comparisons else []
    return [*groups, coverage("edm: tensors of the samplers read", set(recorded), recorded.read)]

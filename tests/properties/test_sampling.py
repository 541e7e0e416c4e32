"""Trajectories: an image does not depend on its batch, and samplers are those of the original programs."""

import copy
import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler
from torch import Tensor, nn

from tests.helpers.sampling import SCHEDULE, SHAPE, predictor
from tfmq_exp.core.seeds import image_generators, initial_noise
from tfmq_exp.denoisers.denoiser import Conditions, Denoiser
from tfmq_exp.diagnostics.trajectory_error import TrajectoryPair
from tfmq_exp.sampling.guidance import Sampling
from tfmq_exp.sampling.samplers import DDIM, PLMS, DPMSolver
from tfmq_exp.sampling.trajectory import Sampler, finite_set, trajectory

CPU = torch.device("cpu")
NONE = Conditions()


def sampled(network: nn.Module, sampler: DDIM, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Initial noise and final float images."""
    generators = image_generators(7, "images", indices)
    noise = initial_noise(generators, SHAPE, CPU)
    *_, last = trajectory(predictor(network), sampler, SCHEDULE, noise, generators, NONE)
    return noise, last.x_next


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_image_does_not_depend_on_its_batch(tiny_unet: nn.Module, eta: float) -> None:
    sampler = DDIM(5, eta)
    noise, final = sampled(tiny_unet, sampler, range(8))
    for batch in (1, 3):
        parts = [sampled(tiny_unet, sampler, range(i, min(i + batch, 8))) for i in range(0, 8, batch)]
        assert torch.equal(torch.cat([part[0] for part in parts]), noise)
        difference = torch.cat([part[1] for part in parts]) - final
        assert difference.abs().max() <= 1e-5 * final.abs().max()  # random networks leave the range of images
    assert len({tuple(image.flatten().tolist()) for image in noise}) == 8


def ddim_by_formula(
    network: nn.Module, noise: Tensor, seeds: list[torch.Generator], steps: int, eta: float
) -> list[Tensor]:
    """DDIM (arXiv 2010.02502), eq. 12 and 16, in double precision with LDM's timesteps; x_T first."""
    alphas = (1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)).cumprod(0).tolist()
    visited = list(range(1, 1000, 1000 // steps))
    x, path = noise.double(), [noise.double()]
    for position in reversed(range(steps)):
        t = visited[position]
        alpha, before = alphas[t], alphas[visited[position - 1]] if position else alphas[0]
        sigma = eta * math.sqrt((1 - before) / (1 - alpha) * (1 - alpha / before))
        eps = network(x, torch.full((len(x),), t)).sample
        clean = (x - math.sqrt(1 - alpha) * eps) / math.sqrt(alpha)
        x = math.sqrt(before) * clean + math.sqrt(1 - before - sigma**2) * eps
        if eta:
            x = x + sigma * torch.stack([torch.randn(SHAPE, generator=seed, dtype=torch.float64) for seed in seeds])
        path.append(x)
    return path


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_trajectory_is_the_formula(tiny_unet: nn.Module, eta: float) -> None:
    network = copy.deepcopy(tiny_unet).double()
    noise = initial_noise(image_generators(7, "images", range(2)), SHAPE, CPU)
    path = ddim_by_formula(network, noise, image_generators(8, "steps", range(2)), 10, eta)
    generators = image_generators(8, "steps", range(2))
    taken = list(trajectory(predictor(network), DDIM(10, eta), SCHEDULE, noise.double(), generators, NONE))
    assert [step.index for step in taken] == list(range(10))
    assert [step.t for step in taken] == [901, 801, 701, 601, 501, 401, 301, 201, 101, 1]
    for step, x, x_next in zip(taken, path[:-1], path[1:], strict=True):
        torch.testing.assert_close(step.x, x, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(step.x_next, x_next, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("steps", [0, -5, 1001])
def test_impossible_steps_are_refused(steps: int) -> None:
    with pytest.raises(
        ValueError,
        match=rf"^({steps} sampler steps are not 1 to 1000|DDIM\.num_inference_steps must be .*, got {steps}$)",
    ):
        DDIM(steps).calls(SCHEDULE)


@pytest.mark.parametrize(("steps", "near"), [(300, "125, 200, 250"), (1000, "200, 250, 500"), (37, "25, 40, 50")])
def test_steps_that_leave_the_training_range_are_refused(steps: int, near: str) -> None:
    with pytest.raises(ValueError, match=rf"^{steps} sampler steps would visit timestep 1000 .*: {near}$"):
        DDIM(steps).calls(SCHEDULE)


@pytest.mark.parametrize("steps", [1, 2, 8, 10, 100, 500])
def test_finite_set(steps: int) -> None:
    assert finite_set(DDIM(steps), SCHEDULE) == tuple(sorted(range(1, 1000, 1000 // steps), reverse=True))


@pytest.mark.parametrize("sampler", [DDIM(100, timestep_spacing="quadratic", steps_offset=0), PLMS(10)])
def test_a_timestep_that_is_visited_twice_is_in_the_finite_set_once(sampler: Sampler) -> None:
    calls = sampler.calls(SCHEDULE)
    assert len(set(calls)) < len(calls)
    assert sorted(set(calls), reverse=True) == list(finite_set(sampler, SCHEDULE))


@pytest.mark.parametrize("sampler", [PLMS, DPMSolver])
def test_deterministic_samplers_refuse_noise(sampler: type[PLMS | DPMSolver]) -> None:
    with pytest.raises(ValueError, match="eta must be 0"):
        sampler(10, eta=1.0)


@pytest.mark.parametrize(("steps", "eta"), [(10, 0.0), (50, 0.0), (20, 1.0)])
def test_uniform_ddim_is_that_of_diffusers(steps: int, eta: float) -> None:
    scheduler = DDIMScheduler(
        **SCHEDULE, clip_sample=False, set_alpha_to_one=False, steps_offset=1, timestep_spacing="leading"
    )
    scheduler.set_timesteps(steps)
    noise = initial_noise(image_generators(7, "images", range(2)), SHAPE, CPU)
    x, generators = noise, image_generators(8, "steps", range(2))
    theirs: Any = list(image_generators(8, "steps", range(2)))
    for step in trajectory(lambda x, *_: 0.6 * x.tanh(), DDIM(steps, eta), SCHEDULE, noise, generators, NONE):
        assert step.t == int(scheduler.timesteps[step.index])
        x = scheduler.step(0.6 * x.tanh(), step.t, x, eta=eta, generator=theirs).prev_sample
        torch.testing.assert_close(step.x_next, x, rtol=1e-5, atol=1e-5 * float(x.abs().max()))


def test_dpm_solver_is_that_of_diffusers() -> None:
    sampler = DPMSolver(10)
    scheduler = sampler.scheduler(SCHEDULE)
    noise = initial_noise(image_generators(7, "images", range(2)), SHAPE, CPU)
    x = noise
    for step in trajectory(lambda x, *_: 0.6 * x.tanh(), sampler, SCHEDULE, noise, [], NONE):
        x = scheduler.step(0.6 * x.tanh(), scheduler.timesteps[step.index], x).prev_sample
        assert torch.equal(step.x_next, x)
    assert step.index == 9


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_error_along_the_trajectory(denoiser: Denoiser, eta: float) -> None:
    sampling = Sampling(DDIM(4, eta))
    exact = sampling.predictor(denoiser.network)
    same = TrajectoryPair(exact, sampling, denoiser, sampling, seed=2).error(3)
    assert [(row["step"], row["t"]) for row in same] == [(0, 751), (1, 501), (2, 251), (3, 1)]
    assert all(row["eps_error"] == row["x_error"] == 0 for row in same)  # both add the same noise, if any

    def shifted(x: Tensor, t: Tensor, conditions: Conditions) -> Tensor:
        eps = exact(x, t, conditions)
        return eps + 0.1 * eps.std()

    wrong = TrajectoryPair(shifted, sampling, denoiser, sampling, seed=2).error(3)
    assert [row["eps_error"] for row in wrong] == pytest.approx([0.01] * 4, rel=1e-4)
    assert all(row["x_error"] > 0 for row in wrong)
    other = TrajectoryPair(exact, Sampling(DDIM(4, 1 - eta)), denoiser, sampling, seed=2).error(3)
    assert all(row["eps_error"] == 0 < row["x_error"] for row in other)  # errors of one step are on the float path

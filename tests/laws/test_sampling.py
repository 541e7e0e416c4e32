"""Trajectories: what an image is does not depend on its batch, and DDIM is the formula of its paper."""

import copy
import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

from tfmq_exp.calibration import collect as collecting
from tfmq_exp.calibration.collect import collect
from tfmq_exp.calibration.timesteps import EveryKth
from tfmq_exp.denoisers.denoiser import Denoiser
from tfmq_exp.evaluation.temporal import trajectory_error
from tfmq_exp.sampling import images
from tfmq_exp.sampling.images import ImagePlan, sample_shard, to_uint8
from tfmq_exp.sampling.sampler import DDIM, noise_predictor, trajectory
from tfmq_exp.sampling.seeds import image_generators, initial_noise

SCHEDULE = {"num_train_timesteps": 1000, "beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02}
SHAPE = (3, 8, 8)
CPU = torch.device("cpu")


@pytest.fixture
def denoiser(tiny_unet: nn.Module) -> Denoiser:
    return Denoiser("tiny", tiny_unet, SHAPE, SCHEDULE, "0" * 64)


def sampled(unet: nn.Module, sampler: DDIM, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Initial noise and final float images."""
    generators = image_generators(7, "images", indices)
    noise = initial_noise(generators, SHAPE, CPU)
    *_, last = trajectory(noise_predictor(unet), sampler, SCHEDULE, noise, generators)
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
    unet: nn.Module, noise: Tensor, seeds: list[torch.Generator], steps: int, eta: float
) -> list[Tensor]:
    """DDIM (arXiv 2010.02502), eq. 12 and 16, in double precision with LDM's timesteps; x_T first."""
    alphas = (1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)).cumprod(0).tolist()
    visited = list(range(1, 1000, 1000 // steps))
    x, path = noise.double(), [noise.double()]
    for position in reversed(range(steps)):
        t = visited[position]
        alpha, before = alphas[t], alphas[visited[position - 1]] if position else alphas[0]
        sigma = eta * math.sqrt((1 - before) / (1 - alpha) * (1 - alpha / before))
        eps = unet(x, torch.full((len(x),), t)).sample
        clean = (x - math.sqrt(1 - alpha) * eps) / math.sqrt(alpha)
        x = math.sqrt(before) * clean + math.sqrt(1 - before - sigma**2) * eps
        if eta:
            x = x + sigma * torch.stack([torch.randn(SHAPE, generator=seed, dtype=torch.float64) for seed in seeds])
        path.append(x)
    return path


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_trajectory_is_the_formula(tiny_unet: nn.Module, eta: float) -> None:
    unet = copy.deepcopy(tiny_unet).double()
    noise = initial_noise(image_generators(7, "images", range(2)), SHAPE, CPU)
    path = ddim_by_formula(unet, noise, image_generators(8, "steps", range(2)), 10, eta)
    generators = image_generators(8, "steps", range(2))
    taken = list(trajectory(noise_predictor(unet), DDIM(10, eta), SCHEDULE, noise.double(), generators))
    assert [step.index for step in taken] == list(range(10))
    assert [step.t for step in taken] == [901, 801, 701, 601, 501, 401, 301, 201, 101, 1]
    for step, x, x_next in zip(taken, path[:-1], path[1:], strict=True):
        # the scheduler holds its coefficients as float32
        torch.testing.assert_close(step.x, x, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(step.x_next, x_next, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("steps", "neighbours"),
    [(30, "20, 25, 40"), (300, "125, 200, 250"), (0, "1, 2, 4"), (1000, "200, 250, 500"), (-5, "1, 2, 4")],
)
def test_steps_that_do_not_divide_are_refused(steps: int, neighbours: str) -> None:
    with pytest.raises(ValueError, match=rf"^{steps} sampler steps.* 1000 .*: {neighbours}$"):
        DDIM(steps).timesteps(SCHEDULE)


@pytest.mark.parametrize("steps", [1, 2, 8, 10, 100, 500])
def test_finite_set(steps: int) -> None:
    assert DDIM(steps).timesteps(SCHEDULE) == tuple(sorted(range(1, 1000, 1000 // steps), reverse=True))


def test_collection_calls_the_denoiser_once_per_step(denoiser: Denoiser) -> None:
    calls: list[int] = []
    handle = denoiser.unet.register_forward_hook(lambda *_: calls.append(1))
    seen: list[int] = []
    data = collect(denoiser, DDIM(4), images=5, seed=3, batch=2, each_step=seen.append)
    handle.remove()
    assert len(calls) == 3 * 4
    assert seen == [0, 1, 2, 3] * 3
    assert len(data) == 4 * 5


def test_collected_inputs_are_the_trajectory(denoiser: Denoiser) -> None:
    data = collect(denoiser, DDIM(4), images=5, seed=3, batch=2)
    assert data.step.tolist() == [0] * 5 + [1] * 5 + [2] * 5 + [3] * 5
    assert data.image.tolist() == [0, 1, 2, 3, 4] * 4
    for indices in (range(2), range(2, 4), range(4, 5)):
        generators = image_generators(3, collecting.STREAM, indices)
        x = initial_noise(generators, SHAPE, CPU)
        for step in trajectory(noise_predictor(denoiser.unet), DDIM(4), SCHEDULE, x, generators):
            rows = (data.step == step.index) & torch.isin(data.image, torch.tensor(indices))
            assert torch.equal(data.x[rows], step.x)
            assert set(data.t[rows].tolist()) == {step.t}


def test_evaluation_does_not_see_calibration_noise(denoiser: Denoiser) -> None:
    calibration = collect(denoiser, DDIM(1), images=8, seed=0, batch=8).x
    evaluation = initial_noise(image_generators(0, images.STREAM, range(8)), SHAPE, CPU)
    distances = torch.cdist(calibration.flatten(1), evaluation.flatten(1))
    assert distances.min() > 10  # independent noise in 192 dimensions is about 19.6 apart


def test_shards_are_the_whole_run(denoiser: Denoiser) -> None:
    plan = ImagePlan(count=7, seed=5, batch=3)
    assert [list(shard) for shard in plan.shards()] == [[0, 1, 2], [3, 4, 5], [6]]
    predict = noise_predictor(denoiser.unet)
    shards = [sample_shard(predict, denoiser, DDIM(4), plan.seed, indices) for indices in plan.shards()]
    assert [(shard.dtype, tuple(shard.shape)) for shard in shards] == [(torch.uint8, (n, *SHAPE)) for n in (3, 3, 1)]
    alone = sample_shard(predict, denoiser, DDIM(4), plan.seed, range(4, 5))
    assert int((shards[1][1].int() - alone[0].int()).abs().max()) <= 1


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_error_along_the_trajectory(denoiser: Denoiser, eta: float) -> None:
    sampler, exact = DDIM(4, eta), noise_predictor(denoiser.unet)
    same = trajectory_error(exact, sampler, denoiser, sampler, images=3, seed=2)
    assert [(row["step"], row["t"]) for row in same] == [(0, 751), (1, 501), (2, 251), (3, 1)]
    assert all(row["eps_error"] == row["x_error"] == 0 for row in same)  # both add the same noise, if any

    def shifted(x: Tensor, t: Tensor) -> Tensor:
        eps = exact(x, t)
        return eps + 0.1 * eps.std()

    wrong = trajectory_error(shifted, sampler, denoiser, sampler, images=3, seed=2)
    assert [row["eps_error"] for row in wrong] == pytest.approx([0.01] * 4, rel=1e-4)
    assert all(row["x_error"] > 0 for row in wrong)
    other = trajectory_error(exact, DDIM(4, 1 - eta), denoiser, sampler, images=3, seed=2)
    assert all(row["eps_error"] == 0 < row["x_error"] for row in other)  # errors of one step are on the float path


@pytest.mark.parametrize(("count", "batch"), [(0, 1), (1, 0), (-1, 4)])
def test_empty_image_plans_are_refused(count: int, batch: int) -> None:
    with pytest.raises(ValueError, match=f"got {count} and {batch}"):
        ImagePlan(count, 0, batch)


def test_to_uint8_boundaries() -> None:
    half = 0.5 / 127.5
    x = torch.tensor([-7.0, -1.0, -1 + 0.9 * half, -1 + 1.1 * half, 1 - 1.1 * half, 1 - 0.9 * half, 1.0, 7.0])
    assert to_uint8(x).tolist() == [0, 0, 0, 1, 254, 255, 255, 255]
    assert to_uint8(x).dtype is torch.uint8
    every = torch.arange(256)
    assert torch.equal(to_uint8(every / 127.5 - 1).long(), every)


@pytest.mark.parametrize("k", [1, 2, 3, 9])
def test_every_kth_step_with_its_rows(denoiser: Denoiser, k: int) -> None:
    data = collect(denoiser, DDIM(4), images=2, seed=3, batch=2)
    kept = EveryKth(k)(data)
    rows = [row for row in range(8) if (row // 2) % k == 0]
    assert torch.equal(kept.x, data.x[rows])
    assert torch.equal(kept.t, data.t[rows])
    assert torch.equal(kept.image, data.image[rows])


def test_every_zeroth_step_is_refused() -> None:
    with pytest.raises(ValueError, match="got 0"):
        EveryKth(0)

"""Trajectories: an image does not depend on its batch, and samplers are those of the original programs."""

import copy
import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler
from safetensors.torch import load_file
from torch import Tensor, nn

from tests.helpers.calibration import collect
from tfmq_exp.calibration.timesteps import EveryKth
from tfmq_exp.core.seeds import Stream, image_generators, initial_noise
from tfmq_exp.denoisers.denoiser import Conditions, Denoiser
from tfmq_exp.diagnostics.trajectory_error import trajectory_error
from tfmq_exp.sampling.guidance import Sampling
from tfmq_exp.sampling.images import ImagePlan, sample_shard, to_uint8
from tfmq_exp.sampling.sampler import Predict, Sampler, finite_set, trajectory
from tfmq_exp.sampling.samplers import ddim
from tfmq_exp.sampling.samplers.ddim import DDIM
from tfmq_exp.sampling.samplers.multistep import PLMS, DPMSolver
from tfmq_exp.sampling.schedule import Spacing, alphas_cumprod

SCHEDULE = {"num_train_timesteps": 1000, "beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02}
SHAPE = (3, 8, 8)
CPU = torch.device("cpu")
NONE = Conditions()
FOUR = Sampling(DDIM(4))


@pytest.fixture
def denoiser(tiny_unet: nn.Module) -> Denoiser:
    return Denoiser("tiny", tiny_unet, SHAPE, SCHEDULE, "0" * 64)


def predictor(unet: nn.Module) -> Predict:
    """The network's own prediction, without guidance."""
    return Sampling(DDIM(1)).predictor(unet)


def sampled(unet: nn.Module, sampler: DDIM, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Initial noise and final float images."""
    generators = image_generators(7, "images", indices)
    noise = initial_noise(generators, SHAPE, CPU)
    *_, last = trajectory(predictor(unet), sampler, SCHEDULE, noise, generators, NONE)
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
    taken = list(trajectory(predictor(unet), DDIM(10, eta), SCHEDULE, noise.double(), generators, NONE))
    assert [step.index for step in taken] == list(range(10))
    assert [step.t for step in taken] == [901, 801, 701, 601, 501, 401, 301, 201, 101, 1]
    for step, x, x_next in zip(taken, path[:-1], path[1:], strict=True):
        torch.testing.assert_close(step.x, x, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(step.x_next, x_next, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("steps", [0, -5, 1001])
def test_impossible_steps_are_refused(steps: int) -> None:
    with pytest.raises(
        ValueError, match=rf"^({steps} sampler steps are not 1 to 1000|DDIM\.steps must be .*, got {steps}$)"
    ):
        DDIM(steps).calls(SCHEDULE)


@pytest.mark.parametrize(("steps", "near"), [(300, "125, 200, 250"), (1000, "200, 250, 500"), (37, "25, 40, 50")])
def test_steps_that_leave_the_training_range_are_refused(steps: int, near: str) -> None:
    with pytest.raises(ValueError, match=rf"^{steps} sampler steps would visit timestep 1000 .*: {near}$"):
        DDIM(steps).calls(SCHEDULE)


@pytest.mark.parametrize("steps", [1, 2, 8, 10, 100, 500])
def test_finite_set(steps: int) -> None:
    assert finite_set(DDIM(steps), SCHEDULE) == tuple(sorted(range(1, 1000, 1000 // steps), reverse=True))


@pytest.mark.parametrize("sampler", [DDIM(100, spacing="quadratic", offset=0), PLMS(10)])
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


GOLDENS = Path(__file__).parents[1] / "goldens" / "compvis"
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
    return DDIM(case["steps"], case["eta"], spacing, offset=int(ldm), ends_clean=not ldm), schedule


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
    monkeypatch.setattr(ddim, "row_noise", lambda like, _: next(noise).to(like))
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
    assert list(DDIM(number, spacing=spacing, offset=int(not cifar)).calls(SCHEDULE)) == calls


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


def test_collection_calls_the_denoiser_once_per_step(denoiser: Denoiser) -> None:
    calls: list[int] = []
    handle = denoiser.unet.register_forward_hook(lambda *_: calls.append(1))
    seen: list[int] = []
    data = collect(denoiser, FOUR, images=5, seed=3, batch=2, each_step=seen.append)
    handle.remove()
    assert len(calls) == 3 * 4
    assert seen == [0, 1, 2, 3] * 3
    assert len(data) == 4 * 5


def test_collected_inputs_are_the_trajectory(denoiser: Denoiser) -> None:
    data = collect(denoiser, FOUR, images=5, seed=3, batch=2)
    assert data.step.tolist() == [0] * 5 + [1] * 5 + [2] * 5 + [3] * 5
    assert data.image.tolist() == [0, 1, 2, 3, 4] * 4
    for indices in (range(2), range(2, 4), range(4, 5)):
        generators = image_generators(3, Stream.CALIBRATION, indices)
        x = initial_noise(generators, SHAPE, CPU)
        for step in trajectory(predictor(denoiser.unet), DDIM(4), SCHEDULE, x, generators, NONE):
            rows = (data.step == step.index) & torch.isin(data.image, torch.tensor(indices))
            assert torch.equal(data.x[rows], step.x)
            assert set(data.t[rows].tolist()) == {step.t}


def test_evaluation_does_not_see_calibration_noise(denoiser: Denoiser) -> None:
    calibration = collect(denoiser, Sampling(DDIM(1)), images=8, seed=0, batch=8).x
    evaluation = initial_noise(image_generators(0, Stream.IMAGES, range(8)), SHAPE, CPU)
    distances = torch.cdist(calibration.flatten(1), evaluation.flatten(1))
    assert distances.min() > 10  # independent noise in 192 dimensions is about 19.6 apart


def test_shards_are_the_whole_run(denoiser: Denoiser) -> None:
    plan = ImagePlan(count=7, seed=5, batch=3)
    assert [list(shard) for shard in plan.shards()] == [[0, 1, 2], [3, 4, 5], [6]]
    predict = predictor(denoiser.unet)
    shards = [sample_shard(predict, denoiser, FOUR, plan, indices) for indices in plan.shards()]
    assert [(shard.dtype, tuple(shard.shape)) for shard in shards] == [(torch.uint8, (n, *SHAPE)) for n in (3, 3, 1)]
    alone = sample_shard(predict, denoiser, FOUR, plan, range(4, 5))
    assert int((shards[1][1].int() - alone[0].int()).abs().max()) <= 1


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_error_along_the_trajectory(denoiser: Denoiser, eta: float) -> None:
    sampling = Sampling(DDIM(4, eta))
    exact = sampling.predictor(denoiser.unet)
    same = trajectory_error(exact, sampling, denoiser, sampling, images=3, seed=2)
    assert [(row["step"], row["t"]) for row in same] == [(0, 751), (1, 501), (2, 251), (3, 1)]
    assert all(row["eps_error"] == row["x_error"] == 0 for row in same)  # both add the same noise, if any

    def shifted(x: Tensor, t: Tensor, conditions: Conditions) -> Tensor:
        eps = exact(x, t, conditions)
        return eps + 0.1 * eps.std()

    wrong = trajectory_error(shifted, sampling, denoiser, sampling, images=3, seed=2)
    assert [row["eps_error"] for row in wrong] == pytest.approx([0.01] * 4, rel=1e-4)
    assert all(row["x_error"] > 0 for row in wrong)
    other = trajectory_error(exact, Sampling(DDIM(4, 1 - eta)), denoiser, sampling, images=3, seed=2)
    assert all(row["eps_error"] == 0 < row["x_error"] for row in other)  # errors of one step are on the float path


@pytest.mark.parametrize(("count", "batch"), [(0, 1), (1, 0), (-1, 4)])
def test_empty_image_plans_are_refused(count: int, batch: int) -> None:
    with pytest.raises(ValueError, match=r"ImagePlan\.(count|batch) must be a whole number, at least 1 .*, got -?\d+$"):
        ImagePlan(count, 0, batch)


def test_to_uint8_boundaries() -> None:
    half = 0.5 / 127.5
    x = torch.tensor([-7.0, -1.0, -1 + 0.9 * half, -1 + 1.1 * half, 1 - 1.1 * half, 1 - 0.9 * half, 1.0, 7.0])
    assert to_uint8(x, "round").tolist() == [0, 0, 0, 1, 254, 255, 255, 255]
    assert to_uint8(x, "truncate").tolist() == [0, 0, 0, 0, 254, 254, 255, 255]
    assert to_uint8(x, "round").dtype is torch.uint8
    every = torch.arange(256)
    assert torch.equal(to_uint8(every / 127.5 - 1, "round").long(), every)


@pytest.mark.parametrize("k", [1, 2, 3, 9])
def test_every_kth_step_with_its_rows(denoiser: Denoiser, k: int) -> None:
    data = collect(denoiser, FOUR, images=2, seed=3, batch=2)
    kept = EveryKth(k)(data)
    rows = [row for row in range(8) if (row // 2) % k == 0]
    assert torch.equal(kept.x, data.x[rows])
    assert torch.equal(kept.t, data.t[rows])
    assert torch.equal(kept.image, data.image[rows])


def test_every_zeroth_step_is_refused() -> None:
    with pytest.raises(ValueError, match="got 0"):
        EveryKth(0)

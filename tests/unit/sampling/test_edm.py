"""EDM's sampler against the original program's numbers and its formulas."""

import json
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.helpers.flow import EDM as FOLDER
from tfmq_exp.core.seeds import image_generators, initial_noise
from tfmq_exp.denoisers.denoiser import Conditions
from tfmq_exp.denoisers.loading.scheduler_config import default_settings
from tfmq_exp.sampling import edm
from tfmq_exp.sampling.diffusers_scheduler import Scheduler
from tfmq_exp.sampling.edm import EDM, Preconditioning
from tfmq_exp.sampling.guidance import Sampling
from tfmq_exp.sampling.recipe import Recipe
from tfmq_exp.sampling.trajectory import Predict, trajectory

pytestmark = pytest.mark.bad_input
INDEX: dict[str, Any] = json.loads((FOLDER / "index.json").read_text(encoding="utf-8"))
STORED = load_file(FOLDER / "samplers.safetensors")
SCHEDULE = {"num_train_timesteps": 1000, "prediction_type": "edm"}
SAMPLERS = {
    "heun_18": EDM(18),
    "heun_7": EDM(7, sigma_min=0.01, sigma_max=20.0, rho=5),
    "heun_10_churn": EDM(10, s_churn=20, s_min=0.05, s_max=50, s_noise=1.003),
    "euler_12": EDM(12, "euler"),
}


def analytic(sigmas: Tensor) -> Predict:
    """The network of the recordings, from its denoised sample; sigmas of the calls in order."""
    s, calls = INDEX["analytic"]["s"], iter(sigmas)
    m0, m1 = STORED["analytic.m0"].double(), STORED["analytic.m1"].double()

    def predict(x: Tensor, _t: Tensor, _: Conditions) -> Tensor:
        sigma = next(calls)
        x = x * (sigma**2 + 0.25).sqrt()
        v = s**2 + sigma**2
        w = torch.sigmoid((((x - m0) ** 2).sum((1, 2, 3)) - ((x - m1) ** 2).sum((1, 2, 3))) / (2 * v))[
            :, None, None, None
        ]
        d = (1 - w) * (s**2 * x + sigma**2 * m0) / v + w * (s**2 * x + sigma**2 * m1) / v
        return (d - 0.25 / (sigma**2 + 0.25) * x) / (sigma * 0.5 / (sigma**2 + 0.25).sqrt())

    return predict


@pytest.mark.parametrize("name", SAMPLERS)
def test_trajectories_are_those_of_the_original_program(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    sampler, noise = SAMPLERS[name], iter(STORED.get(f"{name}.noise", ()))
    monkeypatch.setattr(edm, "row_noise", lambda like, _: next(noise).to(like))
    wanted = STORED[f"{name}.sigmas_of_calls"]
    torch.testing.assert_close(sampler.sigmas, wanted, rtol=1e-12, atol=0)
    latents = STORED["latents"].double()
    steps = list(trajectory(analytic(sampler.sigmas), sampler, SCHEDULE, latents, [], Conditions()))
    path = [latents * sampler.sigma_max, *(step.x_next for step in steps)]
    for x, expected in zip(path, [*STORED[f"{name}.x_of_calls"], STORED[f"{name}.final"]], strict=True):
        assert (x - expected).abs().max() <= 1e-12 * expected.abs().max()
    assert next(noise, None) is None
    assert [step.t for step in steps] == (wanted.float().log() / 4).double().tolist()
    assert len(steps) == INDEX["trajectories"][name]["calls"]


def test_diffusers_scheduler_is_as_near_as_float32_allows() -> None:
    theirs = Scheduler("EDMEulerScheduler", default_settings("EDMEulerScheduler"), 12)
    latents = STORED["latents"].double() * 80 / theirs.start({}).sigma
    predict = analytic(theirs.scheduler().sigmas.double())
    *_, last = trajectory(predict, theirs, {}, latents, [], Conditions())
    expected = STORED["euler_12.final"]
    assert (last.x_next - expected).abs().max() <= 2e-6 * expected.abs().max()


@pytest.mark.parametrize("name", INDEX["networks"])
def test_preconditioning_is_that_of_the_original_networks(name: str) -> None:
    recorded = load_file(FOLDER / f"{name}.io.safetensors")
    factors = Preconditioning.at(recorded["sigma"], 0.5)
    skip, out, scale = (factor[:, None, None, None] for factor in factors[:3])
    assert torch.equal(factors.noise, recorded["c_noise"])
    torch.testing.assert_close(scale * recorded["x"], recorded["network_input"], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(skip * recorded["x"] + out * recorded["F"], recorded["D"], rtol=1e-6, atol=1e-6)


def test_noise_is_added_before_the_first_step_too_and_each_row_has_its_own() -> None:
    sampler, shape, cpu = EDM(4, s_churn=1.0), (2, 3, 3), torch.device("cpu")

    def run(images: range) -> tuple[Tensor, Tensor]:
        generators = image_generators(5, "images", images)
        x = initial_noise(generators, shape, cpu)
        steps = list(trajectory(lambda x, t, _: 0.4 * x + t[0], sampler, SCHEDULE, x, generators, Conditions()))
        return steps[0].x * (float(sampler.sigmas[0]) ** 2 + 0.25) ** 0.5, steps[-1].x_next

    generators = image_generators(5, "images", range(3))
    x = 80 * initial_noise(generators, shape, cpu)
    added = torch.stack([torch.randn(shape, generator=generator) for generator in generators])
    first, final = run(range(3))
    torch.testing.assert_close(first, x + 80 * (1.25**2 - 1) ** 0.5 * added, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(final, torch.cat([run(range(i, i + 1))[1] for i in range(3)]), rtol=1e-5, atol=1e-5)


def test_one_step_goes_to_the_denoised_sample() -> None:
    sampler, x = EDM(1), torch.randn(2, 1, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    (step,) = trajectory(lambda x, *_: 0.3 * x, sampler, SCHEDULE, x, [], Conditions())
    skip, out, scale, _ = Preconditioning.at(torch.tensor(80.0, dtype=torch.float64), 0.5)
    torch.testing.assert_close(step.x_next, (skip + 0.3 * out * scale) * 80 * x, rtol=1e-12, atol=1e-12)


def test_an_artefact_describes_it() -> None:
    for sampler in SAMPLERS.values():
        recipe = Recipe(Sampling(sampler), SCHEDULE, (1, 2, 2))
        again = Recipe.from_json(json.loads(json.dumps(recipe.to_json())))
        assert again == recipe
        assert again.sampling.sampler.calls(SCHEDULE) == sampler.calls(SCHEDULE)
    assert Sampling(EDM(18)).with_steps(7) == Sampling(EDM(7))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_inference_steps": 0}, "EDM.num_inference_steps must be"),
        ({"solver": "rk4"}, "EDM.solver must be one of heun, euler"),
        ({"sigma_min": 0.0}, "EDM.sigma_min must be a number above 0"),
        ({"sigma_min": 90.0}, "EDM.sigma_min must be at most sigma_max=80.0, got 90.0"),
        ({"rho": float("inf")}, "EDM.rho must be"),
        ({"s_churn": -1.0}, "EDM.s_churn must be"),
        ({"s_max": "all"}, "EDM.s_max must be"),
    ],
    ids=str,
)
def test_what_it_cannot_do_is_refused_by_name(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EDM(**{"num_inference_steps": 4} | settings)


@pytest.mark.parametrize("predicted", [None, "epsilon", "v_prediction", "flow_prediction"])
def test_networks_of_other_trainings_are_refused(predicted: str | None) -> None:
    schedule = {"num_train_timesteps": 1000} | ({"prediction_type": predicted} if predicted else {})
    with pytest.raises(ValueError, match="EDM takes networks under EDM's preconditioning, got one of prediction_type="):
        EDM(4).start(schedule)

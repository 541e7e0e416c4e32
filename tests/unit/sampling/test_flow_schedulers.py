"""Schedulers of flow matching and of real timesteps: exact lists, steps, and the dtype that the network gets."""

import json
from itertools import pairwise
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.helpers.flow import CASES, FLOW, flow_sampler
from tfmq_exp.denoisers.denoiser import Conditions
from tfmq_exp.sampling.diffusers_scheduler import Scheduler, SigmaScheduler
from tfmq_exp.sampling.guidance import Sampling
from tfmq_exp.sampling.network_convention import NetworkConvention, PipelineSampler
from tfmq_exp.sampling.recipe import Recipe
from tfmq_exp.sampling.trajectory import finite_set, timestep_rows, trajectory

pytestmark = pytest.mark.bad_input
STORED = load_file(FLOW / "samplers.safetensors")
DIVIDED: Any = (("divide", 1000.0),)
CONVENTIONS = {
    **dict.fromkeys(("flux_1024x1024", "flux_768x1344", "flux_512x512", "flux_schnell_4"), NetworkConvention(DIVIDED)),
    "qwen_image": NetworkConvention(DIVIDED),
    "lumina2_shift6": NetworkConvention((*DIVIDED, ("subtract_from", 1.0)), negated=True),
    "sana_dpm_flow3": NetworkConvention((("multiply", 1.0),)),
}
FLOW_SETTINGS = {"num_train_timesteps": 1000, "shift": 3.0}
DYNAMIC = FLOW_SETTINGS | {"use_dynamic_shifting": True}


def as_pipeline(name: str) -> PipelineSampler:
    return PipelineSampler(flow_sampler(name), CONVENTIONS.get(name, NetworkConvention()))


@pytest.mark.parametrize("name", CASES)
def test_lists_are_those_of_diffusers_to_the_last_bit(name: str) -> None:
    case, sampler = CASES[name], flow_sampler(name)
    assert list(sampler.calls({})) == STORED[f"{name}.timesteps"].tolist()
    assert sampler.scheduler().sigmas.double().tolist() == STORED[f"{name}.sigmas"].tolist()
    network = as_pipeline(name).calls({})
    assert list(network) == STORED[f"{name}.network_t"].tolist()
    assert (len(network), len(set(sampler.calls({})))) == (case["calls"], case["distinct"])
    assert finite_set(as_pipeline(name), {}) == tuple(dict.fromkeys(network))
    kinds = {type(t) for t in sampler.calls({})}
    assert kinds == {int if case["timesteps_dtype"] == "int64" or name == "sdxl_euler_leading" else float}


@pytest.mark.parametrize("name", CASES)
def test_an_artefact_keeps_every_bit(name: str) -> None:
    recipe = Recipe(Sampling(as_pipeline(name)), {"num_train_timesteps": 1000}, (1, 1, 1))
    again = Recipe.from_json(json.loads(json.dumps(recipe.to_json())))
    assert again == recipe
    assert again.sampling.sampler.calls({}) == recipe.sampling.sampler.calls({})


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if "model" in case])
def test_trajectories_are_those_of_diffusers(name: str) -> None:
    wanted, sampler, given = STORED[f"{name}.traj"], flow_sampler(name), list[Tensor]()
    size = 1000 if max(abs(t) for t in sampler.calls({})) > 10 else 1

    def predict(x: Tensor, t: Tensor, _: Conditions) -> Tensor:
        given.append(t)
        return torch.tanh(0.7 * x + 0.1 * torch.sin(t.float() / size).reshape(-1, 1, 1, 1))

    steps = list(trajectory(predict, sampler, {}, STORED[f"{name}.x"], [], Conditions()))
    path = torch.stack([STORED[f"{name}.x"] * sampler.start({}).sigma, *(step.x_next for step in steps)])
    assert (path - wanted).abs().max() <= 1e-5 * wanted.abs().max()
    assert [step.t for step in steps] == [step.t_train for step in steps] == list(sampler.calls({}))
    whole = isinstance(sampler.calls({})[0], int)
    assert {t.dtype for t in given} == {torch.int64 if whole else torch.float32}
    assert torch.stack(given)[:, 0].double().tolist() == list(sampler.calls({}))


def test_a_timestep_keeps_every_bit_on_its_way_to_the_network() -> None:
    exact = STORED["edm_euler.timesteps"].tolist()
    rows = torch.stack([timestep_rows(t, 2, torch.device("cpu")) for t in exact])
    assert rows.dtype == torch.float32
    assert rows[:, 1].double().tolist() == exact
    assert timestep_rows(999, 3, torch.device("cpu")).tolist() == [999, 999, 999]
    assert timestep_rows(999, 3, torch.device("cpu")).dtype == torch.int64


def test_heun_of_flow_matching_by_its_formula() -> None:
    """Velocity v(x, s) = x cos s: Euler's step to the next sigma, then the mean of the slopes at both ends."""
    sampler = flow_sampler("flow_heun_shift3")
    sigmas = list(dict.fromkeys(STORED["flow_heun_shift3.sigmas"].tolist()))
    x = torch.randn(2, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def velocity(x: Tensor, sigma: float) -> Tensor:
        return x * torch.tensor(sigma, dtype=torch.float64).cos()

    expected = x
    for s, following in pairwise(sigmas):
        slope = velocity(expected, s)
        if following:
            slope = (slope + velocity(expected + (following - s) * slope, following)) / 2
        expected = expected + (following - s) * slope
    steps = trajectory(lambda x, t, _: velocity(x, float(t[0]) / 1000), sampler, {}, x, [], Conditions())
    *_, last = steps
    torch.testing.assert_close(last.x_next, expected, rtol=2e-6, atol=2e-6)  # its steps are float32
    assert last.index == 12


def test_the_first_of_two_calls_at_one_timestep_is_the_first_step() -> None:
    """DPM-Solver++ of order 1 with flow sigmas, whose first timesteps are equal whole numbers, by its formula."""
    settings = {"num_train_timesteps": 1000, "use_flow_sigmas": True, "flow_shift": 30.0, "solver_order": 1}
    sampler = Scheduler("DPMSolverMultistepScheduler", settings | {"prediction_type": "flow_prediction"}, 60)
    calls, sigmas = sampler.calls({}), sampler.scheduler().sigmas.double()
    assert calls[0] == calls[1]
    x = expected = torch.ones(1, 1, 1, 1)
    for s, following in pairwise(sigmas):
        v = 0.3 * expected
        expected = following / s * expected + (1 - following - (1 - s) * following / s) * (expected - s * v)
    *_, last = trajectory(lambda x, *_: 0.3 * x, sampler, {}, x, [], Conditions())
    assert last.index == 59
    torch.testing.assert_close(last.x_next, expected.float(), rtol=1e-4, atol=1e-4)


def test_sigmas_and_a_shift_decide_the_steps() -> None:
    plain = SigmaScheduler("FlowMatchEulerDiscreteScheduler", FLOW_SETTINGS, sigmas=(1.0, 0.5))
    shifted = [torch.tensor(3 * s / (1 + 2 * s)).item() * 1000 for s in (1.0, 0.5)]
    assert list(plain.calls({})) == pytest.approx(shifted, rel=1e-6)
    few = SigmaScheduler("FlowMatchEulerDiscreteScheduler", DYNAMIC, 4, mu=0.5)
    assert Sampling(few).with_steps(7).sampler == SigmaScheduler("FlowMatchEulerDiscreteScheduler", DYNAMIC, 7, mu=0.5)
    assert SigmaScheduler("EulerDiscreteScheduler", SDXL, sigmas=(10.0, 2.0, 0.5, 0.0)).calls({})[0] < 999


SDXL = {"num_train_timesteps": 1000, "beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
UNIPC = SDXL | {"prediction_type": "flow_prediction", "use_flow_sigmas": True}
REFUSED: list[tuple[str, dict[str, Any], dict[str, Any], str]] = [
    ("FlowMatchEulerDiscreteScheduler", FLOW_SETTINGS, {}, "give num_inference_steps or sigmas"),
    ("FlowMatchEulerDiscreteScheduler", FLOW_SETTINGS, {"num_inference_steps": 2}, "give sigmas or mu"),
    (
        *("FlowMatchEulerDiscreteScheduler", FLOW_SETTINGS),
        *({"num_inference_steps": 2, "sigmas": (1.0, 0.5)}, "with sigmas the number of steps is fixed"),
    ),
    ("FlowMatchEulerDiscreteScheduler", FLOW_SETTINGS, {"sigmas": (1.0, float("nan"))}, "sigmas must be"),
    ("FlowMatchEulerDiscreteScheduler", FLOW_SETTINGS, {"sigmas": "1"}, "sigmas must be"),
    ("FlowMatchEulerDiscreteScheduler", FLOW_SETTINGS, {"sigmas": ()}, "give num_inference_steps or sigmas"),
    ("FlowMatchEulerDiscreteScheduler", FLOW_SETTINGS, {"sigmas": (1.0,), "mu": 0.5}, "mu=0.5 has no effect"),
    ("FlowMatchEulerDiscreteScheduler", DYNAMIC, {"sigmas": (1.0,)}, "`mu` must be passed"),
    ("FlowMatchEulerDiscreteScheduler", DYNAMIC, {"sigmas": (1.0,), "mu": True}, "mu must be a finite number"),
    ("FlowMatchEulerDiscreteScheduler", {**FLOW_SETTINGS, "shift": 0.0}, {"sigmas": (1.0,)}, "shift must be"),
    ("FlowMatchHeunDiscreteScheduler", FLOW_SETTINGS, {"sigmas": (1.0,)}, "Scheduler takes no sigmas"),
    ("EDMEulerScheduler", {"num_train_timesteps": 1000}, {"sigmas": (80.0, 1.0)}, "EDMEulerScheduler takes no sigmas"),
    ("DDIMScheduler", SDXL, {"sigmas": (1.0,)}, "a DDIMScheduler takes no sigmas"),
    ("UniPCMultistepScheduler", SDXL, {"sigmas": (1.0, 0.5)}, "only supported when `use_flow_sigmas=True`"),
    ("UniPCMultistepScheduler", UNIPC | {"use_flow_sigmas": False}, {"sigmas": (1.0,)}, "with use_flow_sigmas=True"),
    ("KDPM2DiscreteScheduler", SDXL, {"sigmas": (1.0,)}, "_class_name must be one of"),
]


@pytest.mark.parametrize(("kind", "settings", "arguments", "message"), REFUSED, ids=str)
def test_steps_that_cannot_be_set_are_refused_by_name(
    kind: str, settings: dict[str, Any], arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=r".") as refused:
        SigmaScheduler(kind, settings, **arguments)
    assert message in str(refused.value)


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        ("EDMEulerScheduler", {"sigma_min": 0.0}, "sigma_min must be a number above 0, got 0.0"),
        ("EDMEulerScheduler", {"sigma_schedule": "linear"}, "sigma_schedule must be one of karras, exponential"),
        ("EDMEulerScheduler", {"prediction_type": "sample"}, "Prediction type sample is not supported"),
        ("FlowMatchEulerDiscreteScheduler", {"use_dynamic_shifting": True}, "`mu` must be passed"),
        ("FlowMatchEulerDiscreteScheduler", {"use_karras_sigmas": "no"}, "use_karras_sigmas must be true or false"),
        ("FlowMatchEulerDiscreteScheduler", {"time_shift_type": "cubic"}, "time_shift_type"),
    ],
    ids=str,
)
def test_what_a_scheduler_cannot_do_is_refused(kind: str, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=r".") as refused:
        Scheduler(kind, {"num_train_timesteps": 1000} | settings, 4)
    assert message in str(refused.value)

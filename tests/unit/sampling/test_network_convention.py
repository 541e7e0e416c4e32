"""What pipelines make of timesteps, against arithmetic of numpy, and samplers that use it."""

import json
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.helpers.flow import flow_sampler
from tests.helpers.sampling import SCHEDULE
from tfmq_exp.denoisers.denoiser import Conditions
from tfmq_exp.sampling.diffusers_scheduler import SigmaScheduler
from tfmq_exp.sampling.guidance import Sampling
from tfmq_exp.sampling.network_convention import NetworkConvention, PipelineSampler
from tfmq_exp.sampling.recipe import Recipe
from tfmq_exp.sampling.samplers import DDIM, PLMS
from tfmq_exp.sampling.trajectory import finite_set, trajectory

pytestmark = pytest.mark.bad_input
LUMINA2 = NetworkConvention((("divide", 1000.0), ("subtract_from", 1.0)), negated=True)
BFLOAT16 = NetworkConvention((("cast", "bfloat16"), ("divide", 1000.0)))
TIMESTEPS = flow_sampler("flux_1024x1024").calls({})


def bfloat16(value: float) -> float:
    """A number rounded to the nearest bfloat16, of two to the even one: the upper half of its float32."""
    bits = int(np.float32(value).view(np.uint32))
    rounded = bits + 0x7FFF + (bits >> 16 & 1) & 0xFFFF0000
    return float(np.uint32(rounded).view(np.float32))


def test_arithmetic_is_that_of_the_pipelines() -> None:
    for t in TIMESTEPS:
        single = np.float32(t)
        assert NetworkConvention()(t) == t
        assert NetworkConvention((("divide", 1000.0),))(t) == float(single / np.float32(1000))
        assert LUMINA2(t) == float(np.float32(1) - single / np.float32(1000))
        assert NetworkConvention((("subtract_from", 1000.0), ("divide", 1000.0)))(t) == float(
            (np.float32(1000) - single) / np.float32(1000)
        )
        assert BFLOAT16(t) == bfloat16(float(np.float32(bfloat16(t)) / np.float32(1000)))
    assert any(BFLOAT16(t) * 1000 - t > 0.5 for t in TIMESTEPS)  # far more than float32's rounding
    assert NetworkConvention((("multiply", 0.3),))(7) == float(np.float32(7) * np.float32(0.3))


def test_whole_numbers_stay_whole_until_an_operation_makes_them_real() -> None:
    found = NetworkConvention()(999)
    assert (found, type(found)) == (999, int)
    for operation in (("cast", "float32"), ("multiply", 1.0), ("divide", 1.0)):
        found = NetworkConvention((operation,))(999)
        assert (found, type(found)) == (999.0, float)


@pytest.mark.parametrize(
    "operation",
    [
        *(
            ("cast", "int8"),
            ("cast", 1.0),
            ("divide", 0.0),
            ("divide", float("nan")),
            ("divide", "1"),
            ("divide", True),
        ),
        *(("sine", 1.0), ("divide",), "divide", None, (["divide"], 1.0), ("__class__", 1.0)),
    ],
    ids=str,
)
def test_other_operations_are_refused(operation: Any) -> None:
    with pytest.raises(ValueError, match="an operation must be cast with float32, bfloat16, float16, or multiply"):
        NetworkConvention((operation,))


def test_results_that_are_no_timesteps_are_refused() -> None:
    with pytest.raises(ValueError, match=r"make inf of timestep 900\.5"):
        NetworkConvention((("multiply", 1e6), ("cast", "float16")))(900.5)


def test_the_network_gets_its_own_timesteps_and_the_step_knows_both() -> None:
    plain = flow_sampler("lumina2_shift6")
    sampler = PipelineSampler(plain, LUMINA2)
    x = torch.randn(2, 4, 2, 2, generator=torch.Generator().manual_seed(0))
    given = list[Tensor]()

    def predict(x: Tensor, t: Tensor, _: Conditions) -> Tensor:
        given.append(t)
        return -0.5 * x.sin()

    steps = list(trajectory(predict, sampler, {}, x, [], Conditions()))
    unconverted = list(trajectory(lambda x, *_: 0.5 * x.sin(), plain, {}, x, [], Conditions()))
    for step, other in zip(steps, unconverted, strict=True):
        assert torch.equal(step.x_next, other.x_next)
        assert torch.equal(step.eps, -other.eps)  # the network's, as it is
        assert (step.t_train, other.t_train) == (other.t, other.t)
    assert [step.t for step in steps] == list(sampler.calls({})) == torch.stack(given)[:, 0].double().tolist()
    assert sampler.calls({})[0] == 0


def test_two_timesteps_that_the_network_cannot_tell_apart_are_one_of_the_finite_set() -> None:
    sampler = PipelineSampler(DDIM(500), BFLOAT16)
    rounded = {bfloat16(float(np.float32(bfloat16(t)) / np.float32(1000))) for t in range(1, 1000, 2)}
    assert {*finite_set(sampler, SCHEDULE)} == rounded
    assert len(finite_set(sampler, SCHEDULE)) == len(rounded) < len(sampler.calls(SCHEDULE)) == 500
    last = list(trajectory(lambda x, *_: x, sampler, SCHEDULE, torch.ones(1, 1, 1, 1), [], Conditions()))[-1]
    assert (last.index, last.t_train) == (499, 1)


def test_given_sigmas_are_those_of_one_number_of_steps() -> None:
    settings = {"num_train_timesteps": 1000}
    sampler = SigmaScheduler("FlowMatchEulerDiscreteScheduler", settings, sigmas=(1.0, 2 / 3, 1 / 3))
    sampling = Sampling(PipelineSampler(sampler, LUMINA2))
    assert sampling.with_steps(3) == sampling
    with pytest.raises(ValueError, match=r"sigmas of 3 steps.* of 8: set protocol.sampling.num_inference_steps=8"):
        sampling.with_steps(8)


@pytest.mark.parametrize(
    "inner",
    [
        DDIM(4),
        PLMS(4),
        SigmaScheduler(
            "FlowMatchEulerDiscreteScheduler",
            {"num_train_timesteps": 1000, "use_dynamic_shifting": True},
            sigmas=(1.0, 2 / 3, 1 / 3),
            mu=1.1391666666666667,
        ),
    ],
    ids=lambda inner: type(inner).__name__,
)
def test_an_artefact_describes_sampler_and_convention(inner: Any) -> None:
    recipe = Recipe(Sampling(PipelineSampler(inner, LUMINA2)), SCHEDULE, (1, 1, 1))
    again = Recipe.from_json(json.loads(json.dumps(recipe.to_json())))
    assert again == recipe
    assert again.sampling.sampler.calls(SCHEDULE) == recipe.sampling.sampler.calls(SCHEDULE)


@pytest.mark.parametrize(
    "settings",
    [
        {"sampler": {"sampler": "os.system", "settings": {}}},
        {"sampler": {"sampler": "DDIM", "settings": {"num_inference_steps": 0}}},
        {"sampler": None},
        {"convention": {"operations": [["divide", 0]]}},
        {"convention": {"operations": 3}},
        {"convention": {"negated": "yes"}},
        {"convention": None},
        {"more": 1},
        {"sampler": {"sampler": "PipelineSampler", "settings": {}}},
    ],
    ids=str,
)
def test_what_is_no_sampler_of_a_pipeline_is_refused(settings: dict[str, Any]) -> None:
    data = Recipe(Sampling(PipelineSampler(DDIM(4), LUMINA2)), SCHEDULE, (1, 1, 1)).to_json()
    with pytest.raises(ValueError, match=r"\S"):
        Recipe.from_json(data | {"settings": data["settings"] | settings})


def test_steps_are_those_of_the_sampler_inside() -> None:
    sampling = Sampling(PipelineSampler(DDIM(4), BFLOAT16)).with_steps(5)
    assert sampling == Sampling(PipelineSampler(DDIM(5), BFLOAT16))
    with pytest.raises(ValueError, match="holds a sampler of the network's training"):
        PipelineSampler(PipelineSampler(DDIM(4), BFLOAT16), BFLOAT16)
    assert PipelineSampler(DDIM(4, eta=0.5), BFLOAT16).eta == 0.5

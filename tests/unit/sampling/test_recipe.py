"""What a file says of sampling is read back as it was written, and anything else is refused."""

import json
import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from tfmq_exp.denoisers.denoiser import Conditions, Denoiser
from tfmq_exp.sampling.diffusers_scheduler import Scheduler, SigmaScheduler
from tfmq_exp.sampling.guidance import Sampling
from tfmq_exp.sampling.images import ImagePlan, sample_shard, to_uint8
from tfmq_exp.sampling.network_convention import NetworkConvention, PipelineSampler
from tfmq_exp.sampling.recipe import Recipe, required_conditions
from tfmq_exp.sampling.samplers import DDIM, PLMS, DPMSolver
from tfmq_exp.sampling.trajectory import Sampler

pytestmark = pytest.mark.bad_input

SCHEDULE = {"num_train_timesteps": 1000, "beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02}
SAMPLERS: list[Sampler] = [
    DDIM(4),
    DDIM(4, 1.0, "quadratic", 0, set_alpha_to_one=True),
    PLMS(4),
    DPMSolver(4, 3),
    Scheduler("DDPMScheduler", SCHEDULE | {"variance_type": "fixed_large", "clip_sample": True}, 4),
    Scheduler("EulerDiscreteScheduler", SCHEDULE | {"use_karras_sigmas": True}, 4),
    SigmaScheduler("FlowMatchEulerDiscreteScheduler", {"num_train_timesteps": 1000}, sigmas=(1.0, 0.7, 0.3)),
    PipelineSampler(DDIM(4, 1.0), NetworkConvention((("divide", 1000.0), ("subtract_from", 1.0)), negated=True)),
]


@pytest.fixture
def denoiser(tiny_unet: nn.Module) -> Denoiser:
    return Denoiser("tiny", tiny_unet, (3, 8, 8), SCHEDULE, "0" * 64)


@pytest.mark.parametrize("sampler", SAMPLERS, ids=lambda sampler: type(sampler).__name__)
def test_the_images_of_a_run(denoiser: Denoiser, sampler: Sampler) -> None:
    sampling = Sampling(sampler)
    recipe = Recipe.of(sampling, denoiser)
    assert recipe is not None
    again = Recipe.from_json(json.loads(json.dumps(recipe.to_json())))
    assert again == recipe
    predict = sampling.predictor(denoiser.network)
    wanted = sample_shard(predict, denoiser, sampling, ImagePlan(6, 3, 2), range(2, 4))
    found = again.images(denoiser.network, seed=3, indices=range(2, 4))
    assert torch.equal(to_uint8(found, "round"), wanted)


def test_a_network_that_takes_conditions_asks_for_them(tiny_unet: nn.Module, tiny_conditional_unet: nn.Module) -> None:
    recipe = Recipe(Sampling(DDIM(2)), SCHEDULE, (4, 8, 8))
    assert required_conditions(tiny_unet) == []
    with pytest.raises(ValueError, match="give conditions= with encoder_hidden_states of each image"):
        recipe.images(tiny_conditional_unet, seed=0, indices=[0])


@pytest.mark.parametrize(
    "indices", [torch.arange(2, 4), np.arange(2, 4), [np.int64(2), torch.tensor(3)], (2, 3)], ids=str
)
def test_an_image_is_the_same_by_whatever_number(denoiser: Denoiser, indices: Any) -> None:
    recipe = Recipe(Sampling(DDIM(2)), SCHEDULE, (3, 8, 8))
    wanted, three = recipe.images(denoiser.network, seed=3, indices=[2, 3]), np.int64(3)
    assert torch.equal(recipe.images(denoiser.network, seed=3, indices=indices), wanted)
    assert torch.equal(recipe.images(denoiser.network, seed=three, indices=indices), wanted)


@pytest.mark.parametrize("value", [-1, 1.0, 1.5, "0", None, True, 2**63, torch.tensor([1, 2]), math.nan], ids=str)
def test_what_is_no_number_of_an_image_or_a_seed(denoiser: Denoiser, value: Any) -> None:
    recipe = Recipe(Sampling(DDIM(2)), SCHEDULE, (3, 8, 8))
    for name, options in {
        "indices": {"indices": [0, value], "seed": 0},
        "seed": {"indices": [0], "seed": value},
    }.items():
        with pytest.raises(ValueError, match=rf"{name} must be a whole number from 0 to 2\*\*63 - 1, got"):
            recipe.images(denoiser.network, **options)
    with pytest.raises(ValueError, match="indices are of no images"):
        recipe.images(denoiser.network, seed=0, indices=[])


def test_conditions_are_those_of_the_images(denoiser: Denoiser, tiny_conditional_unet: nn.Module) -> None:
    recipe = Recipe(Sampling(DDIM(2)), SCHEDULE, (4, 8, 8))
    unet: Any = tiny_conditional_unet
    width, name = unet.config["cross_attention_dim"], "encoder_hidden_states"

    def given(rows: int, key: str = name) -> Conditions:
        return Conditions({key: torch.ones(rows, 5, width)})

    def failure(network: nn.Module, conditions: Any) -> str:
        with pytest.raises(ValueError, match=r"\S") as caught:
            recipe.images(network, seed=0, indices=[0, 1], conditions=conditions)
        return str(caught.value)

    assert recipe.images(tiny_conditional_unet, seed=0, indices=[0, 1], conditions=given(2)).shape == (2, 4, 8, 8)
    for rows in (1, 3, 4):
        found = failure(tiny_conditional_unet, given(rows))
        assert found == f"conditions must have one row for each of 2 images, got {rows} of {name}"
    for conditions in (["a cat", "a dog"], torch.ones(2, 5, width), {name: torch.ones(2, 5, width)}, "a cat"):
        assert "conditions must be Conditions, got" in failure(tiny_conditional_unet, conditions)
    for conditions in (Conditions(), given(2, "class_labels")):
        assert "give conditions= with encoder_hidden_states" in failure(tiny_conditional_unet, conditions)
    assert "conditions hold encoder_hidden_states, which this network does not take" in failure(
        denoiser.network, given(2)
    )


@dataclass(frozen=True)
class OwnSampler:
    eta: float = 0.0
    settings: Any = field(default_factory=dict)

    def calls(self, schedule: Any) -> tuple[int, ...]:
        return (1,)

    def start(self, schedule: Any) -> Any: ...


def test_a_sampler_of_ones_own_is_not_described(denoiser: Denoiser) -> None:
    assert Recipe.of(Sampling(OwnSampler()), denoiser) is None


def changed(data: dict[str, Any], place: str, value: Any) -> dict[str, Any]:
    first, _, rest = place.partition(".")
    return data | {first: changed(data[first], rest, value) if rest else value}


@pytest.mark.parametrize(
    ("place", "value"),
    [
        ("sampler", None),
        ("sampler", []),
        ("sampler", {}),
        ("settings", None),
        ("settings", []),
        ("sampler", "os.system"),
        ("sampler", ["DDIM"]),
        ("settings.num_inference_steps", "many"),
        ("settings.num_inference_steps", 0),
        ("settings.num_inference_steps", 10**9),
        ("settings.num_inference_steps", -4),
        ("settings.spacing", "golden"),
        ("settings.more", 1),
        ("guidance", "much"),
        ("guidance", float("nan")),
        ("precision", "int3"),
        ("shape", [8]),
        ("shape", [3, 4, 4, 8, 8]),
        ("shape", [3, 8, 2**40]),
        ("shape", [3, -8, 8]),
        ("shape", 3),
        ("schedule", None),
        ("schedule", {}),
        ("schedule.num_train_timesteps", "x"),
        ("schedule.num_train_timesteps", 10**12),
    ],
)
def test_what_is_no_recipe_is_refused(denoiser: Denoiser, place: str, value: Any) -> None:
    recipe = Recipe.of(Sampling(DDIM(4)), denoiser)
    assert recipe is not None
    with pytest.raises(ValueError, match=r"\S"):
        Recipe.from_json(changed(recipe.to_json(), place, value))

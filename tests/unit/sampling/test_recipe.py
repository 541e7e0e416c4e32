"""What a file says of sampling is read back as it was written, and anything else is refused."""

import json
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import nn

from tfmq_exp.denoisers.denoiser import Denoiser
from tfmq_exp.sampling.guidance import Sampling
from tfmq_exp.sampling.images import ImagePlan, sample_shard, to_uint8
from tfmq_exp.sampling.recipe import Recipe, required_conditions
from tfmq_exp.sampling.sampler import Sampler
from tfmq_exp.sampling.samplers import DDIM, PLMS, DPMSolver
from tfmq_exp.sampling.scheduler import Scheduler

pytestmark = pytest.mark.bad_input

SCHEDULE = {"num_train_timesteps": 1000, "beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02}
SAMPLERS: list[Sampler] = [
    DDIM(4),
    DDIM(4, 1.0, "quadratic", 0, set_alpha_to_one=True),
    PLMS(4),
    DPMSolver(4, 3),
    Scheduler("DDPMScheduler", SCHEDULE | {"variance_type": "fixed_large", "clip_sample": True}, 4),
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
    predict = sampling.predictor(denoiser.unet)
    wanted = sample_shard(predict, denoiser, sampling, ImagePlan(6, 3, 2), range(2, 4))
    found = again.images(denoiser.unet, seed=3, indices=range(2, 4))
    assert torch.equal(to_uint8(found, "round"), wanted)


def test_a_network_that_takes_conditions_asks_for_them(tiny_unet: nn.Module, tiny_conditional_unet: nn.Module) -> None:
    recipe = Recipe(Sampling(DDIM(2)), SCHEDULE, (4, 8, 8))
    assert required_conditions(tiny_unet) == []
    with pytest.raises(ValueError, match="give conditions= with encoder_hidden_states of each image"):
        recipe.images(tiny_conditional_unet, seed=0, indices=[0])


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
        ("shape", [3, 8]),
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

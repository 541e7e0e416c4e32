"""The sampling recipe in a quantized network's file: sampler, noise schedule, and the shape of a sample."""

import dataclasses
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from tfmq_exp.core.seeds import Stream, image_generators, initial_noise
from tfmq_exp.core.validate import whole
from tfmq_exp.denoisers.denoiser import Conditions, Denoiser
from tfmq_exp.denoisers.loading.scheduler_config import MOST_TIMESTEPS
from tfmq_exp.sampling.guidance import Sampling
from tfmq_exp.sampling.sampler import Sampler, trajectory
from tfmq_exp.sampling.samplers.ddim import DDIM
from tfmq_exp.sampling.samplers.multistep import PLMS, DPMSolver
from tfmq_exp.sampling.scheduler import Scheduler

LARGEST = 2**16  # channels, or pixels of a side
SAMPLERS: dict[str, Any] = {kind.__name__: kind for kind in (DDIM, PLMS, DPMSolver, Scheduler)}


def at_most(most: int, value: Any) -> int:
    """The value; ValueError if it is no whole number from 1 to `most`."""
    if not whole(value) or not 1 <= value <= most:
        raise ValueError(f"expected a whole number from 1 to {most}, got {value!r}")
    return value


def required_conditions(network: nn.Module) -> list[str]:
    """Required arguments of a UNet of diffusers, or of a quantized one, after sample and timestep."""
    parameters = inspect.signature(getattr(network, "unet", network).forward).parameters.values()
    plain = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return [p.name for p in parameters if p.kind in plain and p.default is p.empty][2:]


@dataclass(frozen=True)
class Recipe:
    """Settings of sampling without the network and its conditions.

    Args:
        sampling: sampler, guidance and precision, without conditions.
        schedule: noise schedule of the network's training.
        shape: channels, height and width of a sample.
    """

    sampling: Sampling
    schedule: Mapping[str, Any]
    shape: tuple[int, int, int]

    @classmethod
    def of(cls, sampling: Sampling, denoiser: Denoiser) -> "Recipe | None":
        """The recipe of a denoiser; None for a user's own sampler class, which a file cannot describe."""
        if type(sampling.sampler) not in SAMPLERS.values():
            return None
        plain = Sampling(sampling.sampler, guidance=sampling.guidance, precision=sampling.precision)
        return cls(plain, denoiser.schedule, denoiser.sample_shape)

    @property
    def sampler(self) -> Sampler:
        """The sampler of `sampling`."""
        return self.sampling.sampler

    def with_steps(self, num_inference_steps: int) -> "Recipe":
        """The same with another number of steps."""
        return dataclasses.replace(self, sampling=self.sampling.with_steps(num_inference_steps))

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        sampler: Any = self.sampler
        return {
            "sampler": type(sampler).__name__,
            "settings": dataclasses.asdict(sampler),
            "guidance": self.sampling.guidance,
            "precision": self.sampling.precision,
            "schedule": dict(self.schedule),
            "shape": list(self.shape),
        }

    @classmethod
    def from_json(cls, data: Any) -> "Recipe":
        """The inverse of `to_json`; ValueError for data that is not a recipe."""
        try:
            kind = data["sampler"]
            if kind not in SAMPLERS:
                raise ValueError(f"unknown sampler {kind!r}; known: {', '.join(SAMPLERS)}")
            sampler = SAMPLERS[kind](**data["settings"])
            sampling = Sampling(sampler, guidance=data["guidance"], precision=data["precision"])
            channels, height, width = (at_most(LARGEST, size) for size in data["shape"])
            schedule = dict(data["schedule"])
            at_most(MOST_TIMESTEPS, schedule["num_train_timesteps"])
            recipe = cls(sampling, schedule, (channels, height, width))
            recipe.sampler.calls(recipe.schedule)
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"it is no sampling recipe: {type(error).__name__} {error}") from error
        return recipe

    @torch.no_grad()
    def images(
        self,
        network: nn.Module,
        *,
        seed: int,
        indices: Sequence[int],
        conditions: Conditions | None = None,
        stream: str = Stream.IMAGES,
    ) -> Float[Tensor, "batch channels height width"]:
        """Sample the images of a run at these indices; latents where the model has a first stage.

        Args:
            network: called like a UNet of diffusers.
            seed: of the run.
            indices: of the images; each has noise of its own.
            conditions: of each image, where the network takes any: `denoiser.encoder(captions)` of a loaded model.
            stream: of random numbers.

        Raises:
            ValueError: a network that takes conditions, and none.
        """
        if conditions is None and (missing := required_conditions(network)):
            raise ValueError(f"this network is conditioned: give conditions= with {', '.join(missing)} of each image")
        device = next(network.parameters()).device
        generators = image_generators(seed, stream, indices)
        x = initial_noise(generators, self.shape, device)
        given = (conditions or Conditions()).to(device)
        for step in trajectory(self.sampling.predictor(network), self.sampler, self.schedule, x, generators, given):
            x = step.x_next
        return x

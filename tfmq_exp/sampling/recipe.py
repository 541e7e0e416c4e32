"""How a quantized network is sampled, as its file has it: sampler, noise schedule, and the shape of a sample."""

import dataclasses
import inspect
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from tfmq_exp.core.seeds import image_generators, initial_noise
from tfmq_exp.core.validate import whole
from tfmq_exp.denoisers.denoiser import Conditions, Denoiser
from tfmq_exp.denoisers.loading.scheduler_config import MOST_TIMESTEPS
from tfmq_exp.sampling.guidance import Sampling
from tfmq_exp.sampling.images import STREAM
from tfmq_exp.sampling.sampler import DDIM, PLMS, DPMSolver, Sampler, trajectory
from tfmq_exp.sampling.scheduler import Scheduler

LARGEST = 2**16  # channels, or pixels of a side
SAMPLERS: dict[str, Any] = {kind.__name__: kind for kind in (DDIM, PLMS, DPMSolver, Scheduler)}


def at_most(most: int, value: Any) -> int:
    """A number of things; ValueError if it is none, or more than there can be."""
    if not whole(value) or not 1 <= value <= most:
        raise ValueError(f"expected a whole number from 1 to {most}, got {value!r}")
    return value


def required_conditions(network: nn.Module) -> list[str]:
    """What a UNet of diffusers, or a quantized one, must be given beside a sample and its timestep."""
    parameters = inspect.signature(getattr(network, "unet", network).forward).parameters.values()
    plain = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return [p.name for p in parameters if p.kind in plain and p.default is p.empty][2:]


@dataclass(frozen=True)
class Recipe:
    """All that sampling needs beside the network and its conditions.

    Args:
        sampling: sampler, guidance and precision; what images are conditioned on is no part of it.
        schedule: the noise that the network was trained on.
        shape: channels, height and width of a sample.
    """

    sampling: Sampling
    schedule: Mapping[str, Any]
    shape: tuple[int, int, int]

    @classmethod
    def of(cls, sampling: Sampling, denoiser: Denoiser) -> "Recipe | None":
        """The way a denoiser is sampled; None for a sampler of one's own, which a file cannot describe."""
        if type(sampling.sampler) not in SAMPLERS.values():
            return None
        plain = Sampling(sampling.sampler, guidance=sampling.guidance, precision=sampling.precision)
        return cls(plain, denoiser.schedule, denoiser.sample_shape)

    @property
    def sampler(self) -> Sampler:
        """Which timesteps, and how one leads to the next."""
        return self.sampling.sampler

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
        """The inverse of `to_json`.

        Raises:
            ValueError: it is none.
        """
        try:
            kind = data["sampler"]
            if kind not in SAMPLERS:
                raise ValueError(f"unknown sampler {kind!r}; known: {', '.join(SAMPLERS)}")
            sampling = Sampling(
                SAMPLERS[kind](**data["settings"]), guidance=data["guidance"], precision=data["precision"]
            )
            channels, height, width = (at_most(LARGEST, size) for size in data["shape"])
            schedule = dict(data["schedule"])
            at_most(MOST_TIMESTEPS, schedule["num_train_timesteps"])
            if not math.isfinite(sampling.guidance):
                raise ValueError(f"guidance must be a finite number, got {sampling.guidance}")
            recipe = cls(sampling, schedule, (channels, height, width))
            recipe.sampler.calls(recipe.schedule)
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"it says in no known way how to sample: {type(error).__name__} {error}") from error
        return recipe

    @torch.no_grad()
    def images(
        self,
        network: nn.Module,
        *,
        seed: int,
        indices: Sequence[int],
        conditions: Conditions | None = None,
        stream: str = STREAM,
    ) -> Float[Tensor, "batch channels height width"]:
        """Sample the images that a run has at these indices under this seed; latents where the model has a first stage.

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

"""The sampling recipe in a quantized network's file: sampler, noise schedule, and the shape of a sample."""

import dataclasses
import inspect
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from tfmq_exp.core.seeds import Stream, image_generators, initial_noise
from tfmq_exp.core.validate import SEED, whole
from tfmq_exp.denoisers.denoiser import Conditions, Denoiser
from tfmq_exp.denoisers.loading.scheduler_config import check_count
from tfmq_exp.sampling.diffusers_scheduler import Scheduler, SigmaScheduler
from tfmq_exp.sampling.edm import EDM
from tfmq_exp.sampling.guidance import Sampling
from tfmq_exp.sampling.network_convention import NetworkConvention, PipelineSampler
from tfmq_exp.sampling.samplers import DDIM, PLMS, DPMSolver
from tfmq_exp.sampling.trajectory import trajectory

LARGEST = 2**16  # channels, or pixels of a side
SAMPLERS: dict[str, Any] = {
    kind.__name__: kind for kind in (DDIM, PLMS, DPMSolver, Scheduler, SigmaScheduler, EDM, PipelineSampler)
}


def is_described(sampler: Any) -> bool:
    """Whether a file can describe a sampler: its class is one of `SAMPLERS`, and so is that of the sampler in it."""
    inner = not isinstance(sampler, PipelineSampler) or is_described(sampler.sampler)
    return type(sampler) in SAMPLERS.values() and inner


def sampler_to_json(sampler: Any) -> dict[str, Any]:
    """Plain data of a sampler that `is_described`."""
    settings = dataclasses.asdict(sampler)
    if isinstance(sampler, PipelineSampler):
        settings["sampler"] = sampler_to_json(sampler.sampler)
    return {"sampler": type(sampler).__name__, "settings": settings}


def sampler_from_json(data: Any) -> Any:
    """The inverse of `sampler_to_json`; ValueError, KeyError or TypeError for data that is no sampler."""
    kind, settings = data["sampler"], data["settings"]
    if kind not in SAMPLERS:
        raise ValueError(f"unknown sampler {kind!r}; known: {', '.join(SAMPLERS)}")
    if SAMPLERS[kind] is PipelineSampler:
        settings = {**settings, "convention": NetworkConvention(**settings["convention"])}
        if settings["sampler"]["sampler"] == kind:
            raise ValueError(f"a {kind} holds no other {kind}")
        settings["sampler"] = sampler_from_json(settings["sampler"])
    return SAMPLERS[kind](**settings)


def as_int(name: str, value: Any) -> int:
    """A whole number of any library as an int, on whose text random streams depend; ValueError for another value."""
    try:
        number = operator.index(value)
    except (TypeError, RuntimeError):  # of PyTorch, for a tensor of several
        number = -1
    if isinstance(value, bool) or not SEED.fits(number):
        raise ValueError(f"{name} must be {SEED.right}, got {value!r:.60}")
    return number


def check_conditions(network: nn.Module, conditions: Any, count: int) -> None:
    """ValueError unless the conditions are those of `count` images, by the names that the network takes."""
    if missing := required_conditions(network):
        required = f"this network is conditioned: give conditions= with {', '.join(missing)} of each image"
        if conditions is None or (
            isinstance(conditions, Conditions) and not {*conditions.given, *conditions.constants} >= {*missing}
        ):
            raise ValueError(required)
    if conditions is None:
        return
    if not isinstance(conditions, Conditions):
        made = "denoiser.encoder(captions) makes them"
        raise ValueError(f"conditions must be Conditions, got {type(conditions).__name__}: {made}")
    given = {name.split(".")[0] for name in (*conditions.given, *conditions.constants)}
    if unknown := given - inspect.signature(getattr(network, "network", network).forward).parameters.keys():
        raise ValueError(f"conditions hold {min(unknown)}, which this network does not take")
    if rows := [f"{len(value)} of {name}" for name, value in conditions.given.items() if len(value) != count]:
        raise ValueError(f"conditions must have one row for each of {count} images, got {rows[0]}")


def required_conditions(network: nn.Module) -> list[str]:
    """Arguments that a network of diffusers, or a quantized one, cannot do without, beside sample and timestep.

    Transformers name what they are conditioned on as an argument with a default, and fail without it.
    """
    own = inspect.signature(getattr(network, "network", network).forward).parameters
    parameters = own.values()
    plain = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    of_images = {"encoder_hidden_states", "class_labels"} - ({"class_labels"} if "sample" in own else set())
    required = [p.name for p in parameters if p.kind in plain and (p.default is p.empty or p.name in of_images)]
    return [name for name in required if name not in (next(iter(own)), "timestep")]


@dataclass(frozen=True)
class Recipe:
    """Sampling without its conditions, the noise schedule of the network's training, and the shape of a sample (C, H, W)."""

    sampling: Sampling
    schedule: Mapping[str, Any]
    shape: tuple[int, ...]

    @classmethod
    def of(cls, sampling: Sampling, denoiser: Denoiser) -> "Recipe | None":
        """The recipe of a denoiser; None for a user's own sampler class, which a file cannot describe."""
        if not is_described(sampling.sampler):
            return None
        plain = Sampling(sampling.sampler, guidance=sampling.guidance, precision=sampling.precision)
        return cls(plain, denoiser.schedule, denoiser.sample_shape)

    def with_steps(self, num_inference_steps: int) -> "Recipe":
        """The same with another number of steps."""
        return dataclasses.replace(self, sampling=self.sampling.with_steps(num_inference_steps))

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {
            **sampler_to_json(self.sampling.sampler),
            "guidance": self.sampling.guidance,
            "precision": self.sampling.precision,
            "schedule": dict(self.schedule),
            "shape": list(self.shape),
        }

    @classmethod
    def from_json(cls, data: Any) -> "Recipe":
        """The inverse of `to_json`; ValueError for data that is not a recipe."""
        try:
            sampler = sampler_from_json(data)
            sampling = Sampling(sampler, guidance=data["guidance"], precision=data["precision"])
            shape = tuple(data["shape"])
            if not 2 <= len(shape) <= 4:
                raise ValueError(f"a sample has two to four axes, got {len(shape)}")
            for size in shape:
                if not whole(size) or not 1 <= size <= LARGEST:
                    raise ValueError(f"expected a whole number from 1 to {LARGEST}, got {size!r}")
            schedule = dict(data["schedule"])
            check_count(schedule["num_train_timesteps"])
            sampler.calls(schedule)
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"it is no sampling recipe: {type(error).__name__} {error}") from error
        return cls(sampling, schedule, shape)

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
            ValueError: no images, or conditions that are not theirs; a seed or an index that is no whole number.
        """
        numbers = [as_int("indices", i) for i in indices]
        if not numbers:
            raise ValueError("indices are of no images: expected whole numbers, as range(16)")
        check_conditions(network, conditions, len(numbers))
        if self.sampling.guided and (conditions is None or conditions.null.keys() != conditions.given.keys()):
            made = "denoiser.encoder(captions) of the model that was quantized makes them"
            raise ValueError(
                f"guidance is {self.sampling.guidance}: conditions need those of no text or class, too; {made}"
            )
        device, generators = next(network.parameters()).device, image_generators(as_int("seed", seed), stream, numbers)
        x, given = initial_noise(generators, self.shape, device), (conditions or Conditions()).to(device)
        predict, sampler = self.sampling.predictor(network), self.sampling.sampler
        for step in trajectory(predict, sampler, self.schedule, x, generators, given):
            x = step.x_next
        return x

"""How images are sampled, whichever network is asked: what two networks must share to be compared."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from tfmq_exp.core.finite import NotFiniteError, require_finite
from tfmq_exp.core.seeds import image_generators, initial_noise
from tfmq_exp.core.validate import AMOUNT, check_fields, one_of
from tfmq_exp.denoisers.denoiser import Conditions, Denoiser, noise_of
from tfmq_exp.denoisers.loading.forward_check import check_timesteps
from tfmq_exp.sampling.conditioning import Conditioning, Unconditional
from tfmq_exp.sampling.sampler import Predict, Sampler, Step, finite_set, trajectory

PRECISIONS = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Sampling:
    """Sampler, conditions, and how the network is asked for the noise.

    Args:
        sampler: which timesteps, and how one leads to the next.
        conditioning: what image i is conditioned on.
        guidance: scale of classifier-free guidance (arXiv 2207.12598) as LDM and Stable Diffusion count it: 1 is none.
        precision: of the network's products, by torch's autocast; the sampler itself works in float32.
    """

    sampler: Sampler
    conditioning: Conditioning = field(default_factory=Unconditional)
    guidance: float = 1.0
    precision: Literal["float32", "float16", "bfloat16"] = "float32"

    def __post_init__(self) -> None:
        check_fields(self, guidance=AMOUNT, precision=one_of(*PRECISIONS))

    @property
    def guided(self) -> bool:
        """Whether every step asks the network twice, with and without condition."""
        return self.guidance != 1.0

    def calls(self, denoiser: Denoiser) -> tuple[int, ...]:
        """The timestep of every step's call of the network."""
        return self.sampler.calls(denoiser.schedule)

    def finite_set(self, denoiser: Denoiser) -> tuple[int, ...]:
        """The distinct timesteps, in the order in which they are first visited."""
        return finite_set(self.sampler, denoiser.schedule)

    def conditions(self, denoiser: Denoiser, seed: int, stream: str, indices: Sequence[int]) -> Conditions:
        """Of images `indices` of a stream, where the network is.

        Raises:
            ValueError: guidance of a network that knows no unconditional mode, or a condition that is not finite.
        """
        found = denoiser.encoder(self.conditioning.choose(seed, stream, indices)).to(denoiser.device)
        if self.guided and not found.null:
            raise ValueError(f"{denoiser.name} has no unconditional mode: guidance must be 1, got {self.guidance}")
        for name, value in (*found.given.items(), *found.null.items()):
            require_finite(value, f"the condition {name}")
        return found

    def check(self, denoiser: Denoiser) -> None:
        """See that a network can be asked as this says, before any image is sampled.

        Raises:
            ValueError: it is not conditioned on what image 0 has, has no unconditional mode, or is not defined at one of the
                sampler's timesteps.
        """
        self.conditions(denoiser, 0, "images", [0])
        check_timesteps(denoiser.unet, self.finite_set(denoiser))

    def predictor(self, unet: Callable[..., Any]) -> Predict:
        """A UNet as a function (x, t, conditions) -> noise, after guidance: e_null + s (e_given - e_null)."""
        dtype, scale = PRECISIONS[self.precision], self.guidance

        def ask(x: torch.Tensor, t: torch.Tensor, conditions: Conditions) -> torch.Tensor:
            given = conditions.given
            if self.guided:  # both halves in one pass, the unconditional first
                null = {name: value.expand(len(x), *value.shape[1:]) for name, value in conditions.null.items()}
                given = {name: torch.cat([null[name], value]) for name, value in given.items()}
                x, t = torch.cat([x, x]), torch.cat([t, t])
            with torch.autocast(x.device.type, dtype, enabled=dtype is not torch.float32):
                eps = noise_of(unet(x, t, **given).sample, x).to(x.dtype)
            if self.guided:
                without, with_condition = eps.chunk(2)
                return without + scale * (with_condition - without)
            return eps

        return ask

    def trajectory(
        self, predict: Predict, denoiser: Denoiser, *, seed: int, stream: str, indices: Sequence[int]
    ) -> Iterator[Step]:
        """Denoise images `indices` of a stream, step by step.

        Raises:
            NotFiniteError: see `tfmq_exp.sampling.sampler.trajectory`; in half precision with what may help.
        """
        generators = image_generators(seed, stream, indices)
        x = initial_noise(generators, denoiser.sample_shape, denoiser.device)
        conditions = self.conditions(denoiser, seed, stream, indices)
        steps = trajectory(predict, self.sampler, denoiser.schedule, x, generators, conditions)
        return explained(steps) if self.precision == "float16" else steps


def explained(steps: Iterator[Step]) -> Iterator[Step]:
    """The steps of a trajectory in float16, whose largest number is 65504: an overflow comes with what helps."""
    try:
        yield from steps
    except NotFiniteError as error:
        advice = "float16 overflows early: set model.sampling.precision to bfloat16 or float32"
        raise NotFiniteError(f"{error}; {advice}") from error

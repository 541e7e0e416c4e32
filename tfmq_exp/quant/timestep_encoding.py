"""Encodings of the timestep for a network that reads it (TDQ, arXiv 2306.02316, section 4 and supplement, table 2)."""

import math
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tfmq_exp.core.checked import Checked
from tfmq_exp.core.validate import COUNT, POSITIVE, SEED, Kind, whole

# cosines and sines share it
WIDTH = Kind(
    "an even whole number from 2 to 65536", lambda value: whole(value) and 2 <= value <= 2**16 and value % 2 == 0
)


class TimeEncoding(Checked):
    """Timesteps [steps] as vectors [steps, width]."""

    def __call__(self, t: Int[Tensor, "steps"]) -> Float[Tensor, "steps width"]:
        raise NotImplementedError


@dataclass(frozen=True)
class Frequency(TimeEncoding):
    """[cos(t w_i), sin(t w_i)], w_i = 10000^(-2i / width): the encoding of the UNet itself; TDQ's choice."""

    kind: ClassVar[str] = "frequency"
    width: Annotated[int, WIDTH]

    def __call__(self, t: Int[Tensor, "steps"]) -> Float[Tensor, "steps width"]:
        half = self.width // 2
        angles = t.float()[:, None] * torch.exp(-math.log(10000) * torch.arange(half, device=t.device) / half)
        return torch.cat([angles.cos(), angles.sin()], dim=1)


@dataclass(frozen=True)
class Normalised(TimeEncoding):
    """t / T, one number: what TDQ_thin reads. T = 1 leaves raw timesteps, with which TDQ's training diverges."""

    kind: ClassVar[str] = "normalised"
    train_timesteps: Annotated[int, COUNT]

    def __call__(self, t: Int[Tensor, "steps"]) -> Float[Tensor, "steps 1"]:
        return t.float()[:, None] / self.train_timesteps


@dataclass(frozen=True)
class RandomFourier(TimeEncoding):
    """[cos 2 pi B t / T, sin 2 pi B t / T], B drawn once from N(0, sigma^2)."""

    kind: ClassVar[str] = "random_fourier"
    width: Annotated[int, WIDTH]
    sigma: Annotated[float, POSITIVE]
    train_timesteps: Annotated[int, COUNT]
    seed: Annotated[int, SEED] = 0

    def __call__(self, t: Int[Tensor, "steps"]) -> Float[Tensor, "steps width"]:
        generator = torch.Generator().manual_seed(self.seed)
        b = self.sigma * torch.randn(self.width // 2, generator=generator).to(t.device)
        angles = 2 * math.pi * (t.float()[:, None] / self.train_timesteps) * b
        return torch.cat([angles.cos(), angles.sin()], dim=1)

"""Encodings of the timestep for a network that reads it (TDQ, arXiv 2306.02316, section 4 and supplement, table 2)."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tfmq_exp.core.validate import COUNT, POSITIVE, SEED, Kind, check_fields, whole

# cosines and sines share it
WIDTH = Kind(
    "an even whole number from 2 to 65536", lambda value: whole(value) and 2 <= value <= 2**16 and value % 2 == 0
)


class TimeEncoding(Protocol):
    """Timesteps as vectors."""

    def __call__(self, t: Int[Tensor, "steps"]) -> Float[Tensor, "steps width"]:
        """One row per timestep."""
        ...


@dataclass(frozen=True)
class Frequency:
    """[cos(t w_i), sin(t w_i)], w_i = 10000^(-2i / width): the encoding of the UNet itself; TDQ's choice."""

    width: int

    def __post_init__(self) -> None:
        check_fields(self, width=WIDTH)

    def __call__(self, t: Int[Tensor, "steps"]) -> Float[Tensor, "steps width"]:
        """Cosines first."""
        half = self.width // 2
        angles = t.float()[:, None] * torch.exp(-math.log(10000) * torch.arange(half, device=t.device) / half)
        return torch.cat([angles.cos(), angles.sin()], dim=1)


@dataclass(frozen=True)
class Normalised:
    """t / T, one number: what TDQ_thin reads. T = 1 leaves raw timesteps, with which TDQ's training diverges."""

    train_timesteps: int

    def __post_init__(self) -> None:
        check_fields(self, train_timesteps=COUNT)

    def __call__(self, t: Int[Tensor, "steps"]) -> Float[Tensor, "steps width"]:
        """A single column."""
        return t.float()[:, None] / self.train_timesteps


@dataclass(frozen=True)
class RandomFourier:
    """[cos 2 pi B t / T, sin 2 pi B t / T], B drawn once from N(0, sigma^2)."""

    width: int
    sigma: float
    train_timesteps: int
    seed: int = 0

    def __post_init__(self) -> None:
        check_fields(self, width=WIDTH, sigma=POSITIVE, train_timesteps=COUNT, seed=SEED)

    def __call__(self, t: Int[Tensor, "steps"]) -> Float[Tensor, "steps width"]:
        """Cosines first."""
        generator = torch.Generator().manual_seed(self.seed)
        b = self.sigma * torch.randn(self.width // 2, generator=generator).to(t.device)
        angles = 2 * math.pi * (t.float()[:, None] / self.train_timesteps) * b
        return torch.cat([angles.cos(), angles.sin()], dim=1)


KINDS: Mapping[str, type[Frequency | Normalised | RandomFourier]] = {
    "frequency": Frequency,
    "normalised": Normalised,
    "random_fourier": RandomFourier,
}


def encoding_to_json(encoding: TimeEncoding) -> dict[str, Any]:
    """What a stored model that still reads the timestep needs to know; TypeError for an encoding of another kind."""
    for kind, cls in KINDS.items():
        if isinstance(encoding, cls):
            return {"kind": kind, **asdict(encoding)}
    raise TypeError(f"a {type(encoding).__name__} cannot be stored; encodings that can: {', '.join(KINDS)}")


def encoding_from_json(data: Mapping[str, Any]) -> TimeEncoding:
    """The inverse of `encoding_to_json`; ValueError for an unknown kind."""
    if data["kind"] not in KINDS:
        raise ValueError(f"unknown kind of encoding {data['kind']!r}; known: {', '.join(KINDS)}")
    return KINDS[data["kind"]](**{name: value for name, value in data.items() if name != "kind"})

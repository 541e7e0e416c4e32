"""Training batches: images, noise and timesteps of every iteration, which follow from the seed and its number alone."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tfmq_exp.core.seeds import Stream, derive_seed
from tfmq_exp.qat.dataset import TrainingSet


class Batch(NamedTuple):
    """One iteration: indices and x_0 of its images, their noise and timesteps, and which of them keep their condition."""

    rows: Int[Tensor, "batch"]
    clean: Float[Tensor, "batch channels height width"]
    noise: Float[Tensor, "batch channels height width"]
    t: Int[Tensor, "batch"]
    conditioned: Bool[Tensor, "batch"]

    def on(self, device: torch.device) -> "Batch":
        """The same on a device."""
        return Batch(*(field.to(device) for field in self))


def noisy(
    clean: Float[Tensor, "batch *rest"],
    noise: Float[Tensor, "batch *rest"],
    t: Int[Tensor, "batch"],
    alphas_cumprod: Float[Tensor, "timesteps"],
) -> Float[Tensor, "batch *rest"]:
    """x_t = sqrt(alpha-bar_t) x_0 + sqrt(1 - alpha-bar_t) noise, row by row (DDPM, arXiv 2006.11239, eq. 4)."""
    alpha = alphas_cumprod[t].reshape(-1, *(1,) * (clean.dim() - 1))
    return (alpha.sqrt().to(clean.dtype) * clean).addcmul((1 - alpha).sqrt().to(clean.dtype), noise)


@dataclass(frozen=True)
class NoisyBatches:
    """Batches by their number, so that a resumed training has those that it would have had.

    Images come in another random order in every epoch; timesteps are uniform over all of the training's.
    """

    images: TrainingSet  # to draw from
    size: int  # rows of a batch
    timesteps: int  # number of timesteps of the training
    condition_dropout: float  # share of rows whose condition is dropped, 0 to 1
    seed: int  # of all random numbers
    stream: str = Stream.TRAINING  # name of the random stream

    def __post_init__(self) -> None:
        if len(self.images) == 0:
            raise ValueError("there are no examples to train on")

    def batch(self, number: int) -> Batch:
        """Batch `number`, from 0; one at the end of an epoch continues with the next."""
        generator = torch.Generator().manual_seed(derive_seed(self.seed, self.stream, Stream.BATCH, number))
        count = len(self.images)
        positions = torch.arange(number * self.size, (number + 1) * self.size)
        epochs = range(int(positions[0]) // count, int(positions[-1]) // count + 1)
        orders = [shuffled(count, self.seed, epoch)[positions[positions // count == epoch] % count] for epoch in epochs]
        rows = torch.cat(orders)
        clean = self.images.rows(rows)
        noise = torch.randn(clean.shape, generator=generator)
        t = torch.randint(self.timesteps, (self.size,), generator=generator)
        return Batch(rows, clean, noise, t, torch.rand(self.size, generator=generator) >= self.condition_dropout)


@dataclass(frozen=True)
class BatchRange:
    """Batches start .. end - 1; an iterable without a length, so that Lightning counts steps and not epochs."""

    batches: NoisyBatches
    start: int
    end: int

    def __iter__(self) -> Iterator[Batch]:
        return map(self.batches.batch, range(self.start, self.end))


@lru_cache(maxsize=2)
def shuffled(count: int, seed: int, epoch: int) -> Int[Tensor, "count"]:
    """Order of the images in an epoch."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(derive_seed(seed, Stream.ORDER, epoch)))

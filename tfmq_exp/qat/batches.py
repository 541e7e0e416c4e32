"""What every iteration learns from: which examples, which timesteps, which noise. All of it follows from the seed and the number."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tfmq_exp.core.seeds import derive_seed
from tfmq_exp.qat.dataset import TrainingSet


class Batch(NamedTuple):
    """One iteration's rows, noise that is added to them, when, and which of them are told their condition."""

    rows: Int[Tensor, "batch"]
    clean: Float[Tensor, "batch channels height width"]
    noise: Float[Tensor, "batch channels height width"]
    t: Int[Tensor, "batch"]
    told: Bool[Tensor, "batch"]


@dataclass(frozen=True)
class NoisyBatches:
    """Batches by their number.

    Examples come in a random order that is another one in every epoch; timesteps are uniform over all of the training's.
    A batch depends on nothing that was drawn before, so an interrupted training goes on with the batches that it would
    have had.

    Args:
        examples: to draw from.
        size: rows of a batch.
        timesteps: of the training.
        untold: share of rows whose condition is dropped.
        seed: of everything.
        stream: another one gives other batches.
    """

    examples: TrainingSet
    size: int
    timesteps: int
    untold: float
    seed: int
    stream: str = "training"

    def __post_init__(self) -> None:
        if len(self.examples) == 0:
            raise ValueError("there are no examples to train on")

    def batch(self, number: int) -> Batch:
        """One of them, counted from 0."""
        generator = torch.Generator().manual_seed(derive_seed(self.seed, self.stream, "batch", number))
        rows = self.rows(number)
        clean = self.examples.rows(rows)
        return Batch(
            rows,
            clean,
            torch.randn(clean.shape, generator=generator),
            torch.randint(self.timesteps, (self.size,), generator=generator),
            torch.rand(self.size, generator=generator) >= self.untold,
        )

    def rows(self, number: int) -> Int[Tensor, "batch"]:
        """Which examples; a batch at the end of an epoch goes on with the next."""
        count = len(self.examples)
        positions = torch.arange(number * self.size, (number + 1) * self.size)
        epochs = range(int(positions[0]) // count, int(positions[-1]) // count + 1)
        return torch.cat(
            [shuffled(count, self.seed, epoch)[positions[positions // count == epoch] % count] for epoch in epochs]
        )

    def since(self, number: int, end: int) -> Iterator[Batch]:
        """Those from one number up to another, which is not among them."""
        return map(self.batch, range(number, end))


@dataclass(frozen=True)
class ResumedBatches:
    """The batches of the iterations that a training still has to do; an iterable of no known length, as Lightning wants it."""

    batches: NoisyBatches
    start: int
    end: int

    def __iter__(self) -> Iterator[Batch]:
        """From the first of them."""
        return self.batches.since(self.start, self.end)


@lru_cache(maxsize=2)
def shuffled(count: int, seed: int, epoch: int) -> Int[Tensor, "count"]:
    """The order of the examples in an epoch."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(derive_seed(seed, "order", epoch)))

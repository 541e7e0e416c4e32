"""Choices of the points of trajectories that a method learns from."""

from dataclasses import dataclass, replace
from typing import Annotated, Protocol

import torch
from jaxtyping import Int
from torch import Tensor

from tfmq_exp.calibration.dataset import CalibrationSet
from tfmq_exp.core.validate import AMOUNT, COUNT, SEED, SHARE, Checked


class TimestepPolicy(Protocol):
    """Chooses calibration samples out of whole trajectories."""

    def __call__(self, data: CalibrationSet) -> CalibrationSet: ...

    def count(self, images: int, calls: int) -> int:
        """Number of states chosen from `images` trajectories with `calls` network calls each."""
        ...


@dataclass(frozen=True)
class EveryKth(Checked):
    """Every k-th sampling step, the first included (Q-Diffusion, arXiv 2302.04304, section 3.2); k = 1 keeps all."""

    k: Annotated[int, COUNT] = 1

    def __call__(self, data: CalibrationSet) -> CalibrationSet:
        return data[data.step % self.k == 0]

    def count(self, images: int, calls: int) -> int:
        return images * -(-calls // self.k)


@dataclass(frozen=True)
class NormallyDistributed(Checked):
    """Normally distributed timesteps, more of them near the image (NDTC of PTQ4DM, arXiv 2211.15736, section 3.3).

    Sample i is one point of one trajectory, at position floor(T N(mean, std)), clamped to 0 .. T - 1, with T sampling steps
    and 0 the position next to the image. Trajectories take turns; a state that is drawn twice is kept twice.

    Args:
        samples: number of draws.
        mean: of the position, as a share of T; the paper asks for at most 0.5, its release uses 0.4.
        std: likewise; 0.4 in the release.
        seed: of the draws.
        released_labels: count as the release does: its counter runs from the noisiest step while its labels count from the
            image, so that a sample at position T - 2 - j gets the timestep of position j.
    """

    samples: Annotated[int, COUNT]
    mean: Annotated[float, SHARE]
    std: Annotated[float, AMOUNT]
    seed: Annotated[int, SEED] = 0
    released_labels: bool = False

    def positions(self, steps: int) -> Int[Tensor, "samples"]:
        """The drawn positions, 0 next to the image."""
        generator = torch.Generator().manual_seed(self.seed)
        drawn = steps * (self.mean + self.std * torch.randn(self.samples, generator=generator))
        return drawn.clamp(0, steps - 1).floor().long()

    def __call__(self, data: CalibrationSet) -> CalibrationSet:
        steps, images = int(data.step.max()) + 1, len(data.image.unique())
        state = data.step * (int(data.image.max()) + 1) + data.image
        rows = state.unique(return_counts=True)[1]  # two under guidance: with and without condition
        complete = len(rows) == steps * images and bool((rows == rows[0]).all())
        if not complete or (self.released_labels and steps < 2):
            raise ValueError(f"normally distributed timesteps need whole trajectories, of {steps} steps here")
        row_of = torch.argsort(state, stable=True).reshape(steps, images, -1)
        positions, image = self.positions(steps), torch.arange(self.samples) % images
        if not self.released_labels:
            return data[row_of[steps - 1 - positions, image].flatten()]
        positions = positions.clamp(max=steps - 2)
        shown, labelled = (data[row_of[step, image].flatten()] for step in (positions + 1, steps - 1 - positions))
        return replace(shown, t=labelled.t, step=labelled.step)

    def count(self, images: int, calls: int) -> int:
        return self.samples

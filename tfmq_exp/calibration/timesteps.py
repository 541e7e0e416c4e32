"""Which points of the trajectory a method learns from."""

from dataclasses import dataclass, replace
from typing import Protocol

import torch
from jaxtyping import Int
from torch import Tensor

from tfmq_exp.calibration.dataset import CalibrationSet
from tfmq_exp.core.validate import AMOUNT, COUNT, SEED, SHARE, SWITCH, check_fields


class TimestepPolicy(Protocol):
    """Chooses calibration samples out of whole trajectories."""

    def __call__(self, data: CalibrationSet) -> CalibrationSet:
        """The samples that are kept."""
        ...

    def count(self, images: int, calls: int) -> int:
        """How many states they are, of so many trajectories with so many network calls each."""
        ...


@dataclass(frozen=True)
class EveryKth:
    """Every k-th sampling step, the first included (Q-Diffusion, arXiv 2302.04304, section 3.2); k = 1 keeps all."""

    k: int = 1

    def __post_init__(self) -> None:
        check_fields(self, k=COUNT)

    def __call__(self, data: CalibrationSet) -> CalibrationSet:
        """The part of the set that is kept."""
        return data[data.step % self.k == 0]

    def count(self, images: int, calls: int) -> int:
        """Every trajectory gives as many."""
        return images * -(-calls // self.k)


@dataclass(frozen=True)
class NormallyDistributed:
    """Normally distributed timesteps, more of them near the image (NDTC of PTQ4DM, arXiv 2211.15736, section 3.3).

    Sample i is one point of one trajectory, at noise level floor(T N(mean, std)), clamped to 0 .. T - 1, with T sampling
    steps and 0 the level next to the image.

    Args:
        samples: how many are drawn; trajectories take turns.
        mean: of the level, as a share of T; the paper asks for at most 0.5, its release uses 0.4.
        std: likewise; 0.4 in the release.
        seed: of the draws.
        released_labels: count as the release does: its counter runs from the noisiest step while its labels count from the
            image, so that a sample of level T - 2 - j is fed to the network with the timestep of level j.

    Raises:
        ValueError: no samples, or a negative spread.
    """

    samples: int
    mean: float
    std: float
    seed: int = 0
    released_labels: bool = False

    def __post_init__(self) -> None:
        check_fields(self, samples=COUNT, mean=SHARE, std=AMOUNT, seed=SEED, released_labels=SWITCH)

    def levels(self, steps: int) -> Int[Tensor, "samples"]:
        """The drawn noise levels."""
        generator = torch.Generator().manual_seed(self.seed)
        drawn = steps * (self.mean + self.std * torch.randn(self.samples, generator=generator))
        return drawn.clamp(0, steps - 1).floor().long()

    def __call__(self, data: CalibrationSet) -> CalibrationSet:
        """The samples that are kept, in the order of the draws; a state that comes twice is kept twice."""
        steps, images = int(data.step.max()) + 1, len(data.image.unique())
        state = data.step * (int(data.image.max()) + 1) + data.image
        rows = state.unique(return_counts=True)[1]  # two under guidance: with and without condition
        whole = len(rows) == steps * images and bool((rows == rows[0]).all())
        if not whole or (self.released_labels and steps < 2):
            raise ValueError(f"normally distributed timesteps need whole trajectories, of {steps} steps here")
        position = torch.argsort(state, stable=True).reshape(steps, images, -1)
        levels, image = self.levels(steps), torch.arange(self.samples) % images
        if not self.released_labels:
            return data[position[steps - 1 - levels, image].flatten()]
        levels = levels.clamp(max=steps - 2)
        shown, labelled = (data[position[at, image].flatten()] for at in (levels + 1, steps - 1 - levels))
        return replace(shown, t=labelled.t, step=labelled.step)

    def count(self, images: int, calls: int) -> int:
        """As many as are drawn, whatever they are drawn from."""
        return self.samples

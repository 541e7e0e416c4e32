"""Which points of the trajectory a method learns from."""

from dataclasses import dataclass
from typing import Protocol

import torch
from jaxtyping import Int
from torch import Tensor

from tfmq_exp.calibration.dataset import CalibrationSet


class TimestepPolicy(Protocol):
    """Chooses calibration samples out of whole trajectories."""

    def __call__(self, data: CalibrationSet) -> CalibrationSet:
        """The samples that are kept."""
        ...

    def count(self, images: int, calls: int) -> int:
        """How many they are, of so many trajectories with so many network calls each."""
        ...


@dataclass(frozen=True)
class EveryKth:
    """Every k-th sampling step, the first included (Q-Diffusion, arXiv 2302.04304, section 3.2); k = 1 keeps all."""

    k: int = 1

    def __post_init__(self) -> None:
        if self.k < 1:
            raise ValueError(f"k must be at least 1, got {self.k}")

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
        if self.samples < 1 or self.std < 0:
            raise ValueError(f"{self.samples} samples with a spread of {self.std} cannot be drawn")

    def levels(self, steps: int) -> Int[Tensor, "samples"]:
        """The drawn noise levels."""
        generator = torch.Generator().manual_seed(self.seed)
        drawn = steps * (self.mean + self.std * torch.randn(self.samples, generator=generator))
        return drawn.clamp(0, steps - 1).floor().long()

    def __call__(self, data: CalibrationSet) -> CalibrationSet:
        """The samples that are kept, in the order of the draws."""
        steps, images = int(data.step.max()) + 1, data.image.unique()
        position = torch.full((steps, int(images.max()) + 1), -1)
        position[data.step, data.image] = torch.arange(len(data))
        if bool((position[:, images] < 0).any()) or (self.released_labels and steps < 2):
            raise ValueError(f"normally distributed timesteps need whole trajectories, of {steps} steps here")
        levels, image = self.levels(steps), images[torch.arange(self.samples) % len(images)]
        if not self.released_labels:
            return data[position[steps - 1 - levels, image]]
        levels = levels.clamp(max=steps - 2)
        shown, labelled = data[position[levels + 1, image]], data[position[steps - 1 - levels, image]]
        return CalibrationSet(shown.x, labelled.t, labelled.step, shown.image, shown.conditions)

    def count(self, images: int, calls: int) -> int:
        """As many as are drawn, whatever they are drawn from."""
        return self.samples

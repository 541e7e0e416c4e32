"""Calibration data: what the network was fed along real trajectories, and where on them."""

from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float, Int
from safetensors.torch import load_file, save_file
from torch import Tensor


@dataclass(frozen=True)
class CalibrationSet:
    """Inputs of the denoiser: noisy samples, their timestep, the sampler's step, and the image whose seed made them."""

    x: Float[Tensor, "samples channels height width"]
    t: Int[Tensor, "samples"]
    step: Int[Tensor, "samples"]
    image: Int[Tensor, "samples"]

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: slice | Tensor) -> "CalibrationSet":
        return CalibrationSet(self.x[index], self.t[index], self.step[index], self.image[index])

    def save(self, path: Path) -> None:
        """Write as safetensors."""
        save_file({name: getattr(self, name).contiguous() for name in ("x", "t", "step", "image")}, path)

    @classmethod
    def load(cls, path: Path) -> "CalibrationSet":
        """Read what `save` wrote."""
        return cls(**load_file(path))

    @classmethod
    def join(cls, parts: "list[CalibrationSet]") -> "CalibrationSet":
        """Several sets as one."""
        return cls(*(torch.cat([getattr(p, name) for p in parts]) for name in ("x", "t", "step", "image")))

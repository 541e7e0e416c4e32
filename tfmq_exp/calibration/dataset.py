"""Calibration data: what the network was fed along real trajectories, and where on them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from safetensors.torch import load_file, save_file
from torch import Tensor

CONDITION = "condition."


@dataclass(frozen=True)
class CalibrationSet:
    """Inputs of the denoiser: noisy samples, their timestep, the sampler's step, and the image whose seed made them.

    `conditions` are further keyword arguments of the UNet, row by row (`encoder_hidden_states`, say).
    """

    x: Float[Tensor, "samples channels height width"]
    t: Int[Tensor, "samples"]
    step: Int[Tensor, "samples"]
    image: Int[Tensor, "samples"]
    conditions: Mapping[str, Tensor] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: slice | Tensor) -> "CalibrationSet":
        conditions = {name: value[index] for name, value in self.conditions.items()}
        return CalibrationSet(self.x[index], self.t[index], self.step[index], self.image[index], conditions)

    def inputs(self, device: torch.device) -> dict[str, Any]:
        """Keyword arguments of the UNet."""
        conditions = {name: value.to(device) for name, value in self.conditions.items()}
        return {"sample": self.x.to(device), "timestep": self.t.to(device), **conditions}

    def tensors(self) -> dict[str, Tensor]:
        """Everything by name, as it is stored."""
        named = {"x": self.x, "t": self.t, "step": self.step, "image": self.image}
        return named | {CONDITION + name: value for name, value in self.conditions.items()}

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> "CalibrationSet":
        """The inverse of `tensors`."""
        conditions = {k.removeprefix(CONDITION): v for k, v in tensors.items() if k.startswith(CONDITION)}
        return cls(tensors["x"], tensors["t"], tensors["step"], tensors["image"], conditions)

    def save(self, path: Path) -> None:
        """Write as safetensors."""
        save_file({name: value.contiguous() for name, value in self.tensors().items()}, path)

    @classmethod
    def load(cls, path: Path) -> "CalibrationSet":
        """Read what `save` wrote."""
        return cls.of(load_file(path))

    @classmethod
    def join(cls, parts: "Sequence[CalibrationSet]") -> "CalibrationSet":
        """Several sets as one."""
        return cls.of({name: torch.cat([part.tensors()[name] for part in parts]) for name in parts[0].tensors()})

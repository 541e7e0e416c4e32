"""Calibration data: what a denoiser is fed along its sampling trajectories."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
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

    Args:
        conditions: distinct rows of the UNet's further keyword arguments (`encoder_hidden_states`, say): a caption's
            context is large, and the same at every step.
        condition: which of these rows a sample has; every sample its own, if that is not said.
    """

    x: Float[Tensor, "samples channels height width"]
    t: Int[Tensor, "samples"]
    step: Int[Tensor, "samples"]
    image: Int[Tensor, "samples"]
    conditions: Mapping[str, Tensor] = field(default_factory=dict)
    condition: Int[Tensor, "samples"] = field(default_factory=lambda: torch.zeros(0, dtype=torch.long))

    def __post_init__(self) -> None:
        if not len(self.condition):
            own = torch.arange(len(self.x)) if self.conditions else torch.zeros(len(self.x), dtype=torch.long)
            object.__setattr__(self, "condition", own)

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: slice | Tensor) -> "CalibrationSet":
        x, t, step, image, condition = (p[index] for p in (self.x, self.t, self.step, self.image, self.condition))
        return CalibrationSet(x, t, step, image, self.conditions, condition)

    def inputs(self, device: torch.device) -> dict[str, Any]:
        """Keyword arguments of the UNet."""
        conditions = {name: value[self.condition].to(device) for name, value in self.conditions.items()}
        return {"sample": self.x.to(device), "timestep": self.t.to(device), **conditions}

    def tensors(self) -> dict[str, Tensor]:
        """Everything by name, as it is stored."""
        named = {"x": self.x, "t": self.t, "step": self.step, "image": self.image, "condition": self.condition}
        return named | {CONDITION + name: value for name, value in self.conditions.items()}

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> "CalibrationSet":
        """The inverse of `tensors`."""
        conditions = {k.removeprefix(CONDITION): v for k, v in tensors.items() if k.startswith(CONDITION)}
        x, t, step, image, condition = (tensors[name] for name in ("x", "t", "step", "image", "condition"))
        return cls(x, t, step, image, conditions, condition)

    def save(self, path: Path) -> None:
        """Write as safetensors."""
        save_file({name: value.contiguous() for name, value in self.tensors().items()}, path)

    @classmethod
    def load(cls, path: Path) -> "CalibrationSet":
        """Read what `save` wrote."""
        return cls.of(load_file(path))

    @classmethod
    def join(cls, parts: "Sequence[CalibrationSet]") -> "CalibrationSet":
        """Several sets as one; parts that share their table of conditions go on sharing it."""
        tables: dict[int, tuple[int, Mapping[str, Tensor]]] = {}
        moved: list[CalibrationSet] = []
        rows = 0
        for part in parts:
            key = id(part.conditions)
            if key not in tables:
                tables[key] = (rows, part.conditions)
                rows += len(next(iter(part.conditions.values()), ()))
            moved.append(replace(part, condition=part.condition + tables[key][0]))
        columns = {
            name: torch.cat([part.tensors()[name] for part in moved])
            for name in ("x", "t", "step", "image", "condition")
        }
        shared = {
            CONDITION + name: torch.cat([table[name] for _, table in tables.values()]) for name in parts[0].conditions
        }
        return cls.of(columns | shared)

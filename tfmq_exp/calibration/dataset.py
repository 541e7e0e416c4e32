"""Calibration data: inputs of a denoiser along its sampling trajectories."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from safetensors.torch import load_file, save_file
from torch import Tensor

CONDITION = "condition."  # prefix of conditions in a file
COLUMNS = ("x", "t", "step", "image", "condition")


@dataclass(frozen=True)
class CalibrationSet:
    """Inputs of the denoiser: noisy samples, their timestep, the sampler's step, and the image whose seed made them.

    Args:
        conditions: distinct rows of the UNet's further keyword arguments (`encoder_hidden_states`, say): a caption's
            context is large, and the same at every step.
        condition: row of each sample in these; by default every sample has its own.
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
        return replace(self, **{name: getattr(self, name)[index] for name in COLUMNS})

    def inputs(self, device: torch.device) -> dict[str, Any]:
        """Keyword arguments of the UNet."""
        conditions = {name: value[self.condition].to(device) for name, value in self.conditions.items()}
        return {"sample": self.x.to(device), "timestep": self.t.to(device), **conditions}

    def save(self, path: Path) -> None:
        """Write as safetensors."""
        tensors = {name: getattr(self, name) for name in COLUMNS}
        tensors |= {CONDITION + name: value for name, value in self.conditions.items()}
        save_file({name: value.contiguous() for name, value in tensors.items()}, path)

    @classmethod
    def load(cls, path: Path) -> "CalibrationSet":
        """Read what `save` wrote."""
        tensors = load_file(path)
        columns = {name: tensors.pop(name) for name in COLUMNS}
        return cls(**columns, conditions={key.removeprefix(CONDITION): value for key, value in tensors.items()})

    @classmethod
    def join(cls, parts: "Sequence[CalibrationSet]") -> "CalibrationSet":
        """Several sets as one; parts with the same table of conditions go on sharing it."""
        first_rows: dict[int, int] = {}
        tables: list[Mapping[str, Tensor]] = []
        moved: list[CalibrationSet] = []
        rows = 0
        for part in parts:
            if id(part.conditions) not in first_rows:
                first_rows[id(part.conditions)] = rows
                tables.append(part.conditions)
                rows += len(next(iter(part.conditions.values()), ()))
            moved.append(replace(part, condition=part.condition + first_rows[id(part.conditions)]))
        conditions = {name: torch.cat([table[name] for table in tables]) for name in parts[0].conditions}
        columns = {name: torch.cat([getattr(part, name) for part in moved]) for name in COLUMNS}
        return cls(**columns, conditions=conditions)

"""Calibration data: inputs of a denoiser along its sampling trajectories, collected in one pass of the float model.

Every step of every trajectory is taken, T denoiser calls for T steps. The releases restart from fresh noise for every captured
step, T(T-1)/2 calls.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import torch
from jaxtyping import Float, Int
from safetensors.torch import load_file, save_file
from torch import Tensor

from tfmq_exp.core.seeds import Stream
from tfmq_exp.core.validate import COUNT, Checked, optional
from tfmq_exp.denoisers.denoiser import Denoiser
from tfmq_exp.sampling.guidance import Sampling

CONDITION = "condition."  # prefix of conditions in a file
COLUMNS = ("x", "t", "step", "image", "condition")


@dataclass(frozen=True)
class CalibrationPlan(Checked):
    """Float-model trajectories that calibration sees (`protocol.calibration`)."""

    images: Annotated[int, COUNT]  # their number
    batch: Annotated[int, COUNT]  # how many run together
    # of their sampler, where it is not that of the images
    num_inference_steps: Annotated[int | None, optional(COUNT)] = None


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
    def join(cls, parts: "Sequence[CalibrationSet]", by_step: bool = False) -> "CalibrationSet":
        """Several sets as one, ordered `by_step` or as given; parts with the same table of conditions go on sharing it."""
        tables = {id(part.conditions): part.conditions for part in parts}
        first_rows: dict[int, int] = {}
        rows = 0
        for key, table in tables.items():
            first_rows[key] = rows
            rows += len(next(iter(table.values()), ()))
        moved = [replace(part, condition=part.condition + first_rows[id(part.conditions)]) for part in parts]
        columns = {name: torch.cat([getattr(part, name) for part in moved]) for name in COLUMNS}
        conditions = {name: torch.cat([table[name] for table in tables.values()]) for name in parts[0].conditions}
        whole = cls(**columns, conditions=conditions)
        return whole[torch.argsort(whole.step, stable=True)] if by_step else whole


def collect_trajectories(
    denoiser: Denoiser,
    sampling: Sampling,
    indices: range,
    *,
    seed: int,
    each_step: Callable[[int], None] = lambda _: None,
) -> CalibrationSet:
    """All steps of the float model's trajectories `indices`, as one batch; their seeds are not those of sampled images.

    Under guidance the network sees every state twice, with and without condition, and so does the set.

    Args:
        denoiser: the float model.
        sampling: sampler, conditions and guidance.
        indices: of the trajectories.
        seed: of the run.
        each_step: called with the index of each finished step.
    """
    n = len(indices)
    conditions = sampling.conditions(denoiser, seed, Stream.CALIBRATION, indices).to(torch.device("cpu"))
    table = dict(conditions.given)
    rows = torch.arange(n) if table else torch.zeros(n, dtype=torch.long)
    if sampling.guided:  # the last row of the table is that of no condition
        table = {name: torch.cat([value, conditions.null[name]]) for name, value in table.items()}
        rows = torch.cat([rows, torch.full((n,), n)])
    repeats = len(rows) // n
    image = torch.tensor(indices).repeat(repeats)
    parts: list[CalibrationSet] = []
    predict = sampling.predictor(denoiser.unet)
    for step in sampling.trajectory(predict, denoiser, seed=seed, stream=Stream.CALIBRATION, indices=indices):
        t, index = torch.full_like(rows, step.t), torch.full_like(rows, step.index)
        parts.append(CalibrationSet(step.x.cpu().repeat(repeats, 1, 1, 1), t, index, image, table, rows))
        each_step(step.index)
    return CalibrationSet.join(parts)

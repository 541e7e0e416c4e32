"""Calibration data: inputs of a denoiser along its sampling trajectories, collected in one pass of the float model.

Every step of every trajectory is taken, T denoiser calls for T steps. The releases restart from fresh noise for every captured
step, T(T-1)/2 calls.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from tfmq_exp.core.seeds import Stream
from tfmq_exp.core.tensor_file import read_tensor_file, write_tensor_file
from tfmq_exp.core.validate import COUNT, Checked, optional
from tfmq_exp.denoisers.denoiser import Denoiser, first_argument, nested
from tfmq_exp.denoisers.families.find import family_of
from tfmq_exp.quant.timestep_context import network_timesteps
from tfmq_exp.sampling.guidance import Sampling

CONDITION, CONSTANT = "condition.", "constant."  # prefixes of names in a file
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
        conditions: distinct rows of the network's further keyword arguments (`encoder_hidden_states`, say): a caption's
            context is large, and the same at every step.
        condition: row of each sample in these; by default every sample has its own.
        constants: keyword arguments that all samples share.
        first_argument: name of the network's noisy input.
        lengths: name of the condition that masks a text, where the network cuts a batch to its longest text.
    """

    x: Float[Tensor, "samples ..."]
    t: Shaped[Tensor, "samples"]  # int64, or float64 with the exact value of the network's float32
    step: Int[Tensor, "samples"]
    image: Int[Tensor, "samples"]
    conditions: Mapping[str, Tensor] = field(default_factory=dict)
    condition: Int[Tensor, "samples"] = field(default_factory=lambda: torch.zeros(0, dtype=torch.long))
    constants: Mapping[str, Any] = field(default_factory=dict)
    first_argument: str = "sample"
    lengths: str | None = None

    def __post_init__(self) -> None:
        if not len(self.condition):
            own = torch.arange(len(self.x)) if self.conditions else torch.zeros(len(self.x), dtype=torch.long)
            object.__setattr__(self, "condition", own)

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: slice | Tensor) -> "CalibrationSet":
        return replace(self, **{name: getattr(self, name)[index] for name in COLUMNS})

    def inputs(self, device: torch.device) -> dict[str, Any]:
        """Keyword arguments of the network."""
        conditions = {name: value[self.condition].to(device) for name, value in self.conditions.items()}
        constants = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in self.constants.items()}
        t = network_timesteps(self.t).to(device)
        return {self.first_argument: self.x.to(device), "timestep": t, **nested({**conditions, **constants})}

    def extremes(self) -> Int[Tensor, "0 or 2"]:
        """Indices of a sample with the longest text and of one with the shortest.

        With both, every batch has one shape, and masks its texts; none where a batch has one shape in any case.
        """
        none = torch.zeros(0, dtype=torch.long)
        if self.lengths is None or not len(self):
            return none
        words = self.conditions[self.lengths].flatten(1).sum(dim=1)[self.condition]
        return none if bool((words == words[0]).all()) else torch.stack([words.argmax(), words.argmin()])

    def save(self, path: Path) -> None:
        """Write as safetensors."""
        tensors = {name: getattr(self, name) for name in COLUMNS}
        tensors |= {CONDITION + name: value for name, value in self.conditions.items()}
        tensors |= {CONSTANT + name: value for name, value in self.constants.items() if isinstance(value, Tensor)}
        plain = {name: value for name, value in self.constants.items() if not isinstance(value, Tensor)}
        header = {"constants": plain, "first_argument": self.first_argument, "lengths": self.lengths}
        write_tensor_file(path, {name: value.contiguous() for name, value in tensors.items()}, header)

    @classmethod
    def load(cls, path: Path) -> "CalibrationSet":
        """Read what `save` wrote."""
        header, tensors = read_tensor_file(path)
        columns = {name: tensors.pop(name) for name in COLUMNS}
        conditions, constants = (
            {name.removeprefix(kind): value for name, value in tensors.items() if name.startswith(kind)}
            for kind in (CONDITION, CONSTANT)
        )
        constants |= header.get("constants", {})
        return cls(
            **columns,
            conditions=conditions,
            constants=constants,
            first_argument=header["first_argument"],
            lengths=header.get("lengths"),  # files of before networks that cut texts have none
        )

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
        whole = replace(parts[0], **columns, conditions=conditions)
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
    predict = sampling.predictor(denoiser.call)
    for step in sampling.trajectory(predict, denoiser, seed=seed, stream=Stream.CALIBRATION, indices=indices):
        t = torch.tensor(step.t, dtype=torch.float64 if isinstance(step.t, float) else torch.int64).expand(len(rows))
        x = step.x.cpu().repeat(repeats, *[1] * (step.x.dim() - 1))
        columns = x, t, torch.full_like(rows, step.index), image, table, rows
        network = first_argument(denoiser.network), family_of(denoiser.network).lengths
        parts.append(CalibrationSet(*columns, conditions.constants, *network))
        each_step(step.index)
    return CalibrationSet.join(parts)

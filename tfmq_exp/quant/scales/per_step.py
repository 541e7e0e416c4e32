"""Finite Set Calibration (FSC): one scale for each of the sampler's timesteps (TFMQ-DM, arXiv 2311.16503, section 4.3)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from tfmq_exp.quant.scales.base import EMAConfig, EMARange
from tfmq_exp.quant.spec import QParams, QuantSpec
from tfmq_exp.quant.timestep_context import TimestepContext


@dataclass(frozen=True)
class PerStepConfig(EMAConfig):
    """Configuration of `PerStepScale`."""

    kind: ClassVar[str] = "per_step"

    def build(self, spec: QuantSpec, context: TimestepContext) -> "PerStepScale":
        return PerStepScale(self, spec, context)


class PerStepScale(EMARange):
    """A table of ranges; each row of a batch reads the entry of its own sampling step.

    A temporal feature takes one value per step, so its range is exact after one batch. Other activations vary with the
    image, and their ranges move as in `StaticScale`.

    Args:
        config: of the running ranges.
        spec: of the integers.
        context: the timesteps of the batch.
        entry_of_step: which entry a step reads (default: each its own).
    """

    per_step = True
    entry_of_step: Tensor

    def __init__(
        self, config: EMAConfig, spec: QuantSpec, context: TimestepContext, entry_of_step: Sequence[int] | None = None
    ) -> None:
        entries = torch.tensor(range(context.num_steps) if entry_of_step is None else entry_of_step)
        super().__init__(config, spec, entries=int(entries.max()) + 1)
        self.context = context
        self.register_buffer("entry_of_step", entries, persistent=False)

    def observe(self, x: Float[Tensor, "batch *rest"]) -> None:
        self.update_range(x, self.entry_of_step[self.context.index])

    def forward(self, x: Float[Tensor, "batch *rest"]) -> QParams:
        """A pair per row, shape [batch, 1, ...]."""
        entries = self.entry_of_step[self.context.index]
        shape = (len(entries),) + (1,) * (x.dim() - 1)
        return QParams(self.scale[entries].reshape(shape), self.zero_point[entries].reshape(shape))

    def step_table(self, steps: int) -> QParams:
        """The entry of every step."""
        return QParams(self.scale[self.entry_of_step], self.zero_point[self.entry_of_step])

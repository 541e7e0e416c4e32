"""Finite Set Calibration (FSC): one range for each of the sampler's timesteps (TFMQ-DM, arXiv 2311.16503, section 4.3)."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from tfmq_exp.quant.clock import StepClock
from tfmq_exp.quant.ranges import RangeEstimator
from tfmq_exp.quant.sources.base import DEFAULT_ESTIMATOR, RunningRange
from tfmq_exp.quant.spec import QParams, QuantSpec


class PerStep(RunningRange):
    """A table of ranges; each row of a batch reads the entry of its own sampling step.

    A temporal feature takes one value per step, so its range is exact after one look. Other activations vary with the
    image, and their ranges move as in `Static`.

    Args:
        spec: the grid.
        clock: says at which step each row is.
        momentum, estimator: see `RunningRange`.
        entry_of_step: which entry a step reads (default: each its own).
    """

    per_step = True
    entry_of_step: Tensor

    def __init__(
        self,
        spec: QuantSpec,
        clock: StepClock,
        *,
        momentum: float = 0.0,
        estimator: RangeEstimator = DEFAULT_ESTIMATOR,
        entry_of_step: Sequence[int] | None = None,
    ) -> None:
        entries = torch.tensor(range(clock.num_steps) if entry_of_step is None else entry_of_step)
        super().__init__(spec, entries=int(entries.max()) + 1, momentum=momentum, estimator=estimator)
        self.clock = clock
        self.register_buffer("entry_of_step", entries, persistent=False)

    def observe(self, x: Float[Tensor, "batch *rest"]) -> None:
        """Move the ranges of the steps that are in this batch."""
        self.show(x, self.entry_of_step[self.clock.index])

    def forward(self, x: Float[Tensor, "batch *rest"]) -> QParams:
        """A pair per row, shape [batch, 1, ...]."""
        entries = self.entry_of_step[self.clock.index]
        shape = (len(entries),) + (1,) * (x.dim() - 1)
        return QParams(self.scale[entries].reshape(shape), self.zero_point[entries].reshape(shape))

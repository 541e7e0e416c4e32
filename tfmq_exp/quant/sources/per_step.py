"""Finite Set Calibration (FSC): one range for each of the sampler's timesteps (TFMQ-DM, arXiv 2311.16503, section 4.3)."""

import torch
from jaxtyping import Float
from torch import Tensor

from tfmq_exp.quant.clock import StepClock
from tfmq_exp.quant.sources.base import RunningRange
from tfmq_exp.quant.spec import QParams, QuantSpec


class PerStep(RunningRange):
    """A table of ranges, one entry per sampling step; each row of a batch reads its own.

    A temporal feature takes one value per step, so its range is exact after one look. Other activations vary with the
    image, and their ranges move as in `Static`.
    """

    per_step = True

    def __init__(self, spec: QuantSpec, clock: StepClock, *, momentum: float) -> None:
        super().__init__(spec, entries=clock.num_steps, momentum=momentum)
        self.clock = clock

    def observe(self, x: Float[Tensor, "batch *rest"]) -> None:
        """Move the ranges of the steps that are in this batch."""
        steps, rows = self.clock.index, x.flatten(1)
        nothing = torch.full_like(self.lo, torch.inf)
        lo = nothing.scatter_reduce(0, steps, rows.amin(dim=1), "amin")
        hi = (-nothing).scatter_reduce(0, steps, rows.amax(dim=1), "amax")
        self.update(lo, hi)

    def forward(self, x: Float[Tensor, "batch *rest"]) -> QParams:
        """A pair per row, shape [batch, 1, ...]."""
        steps = self.clock.index
        shape = (len(steps),) + (1,) * (x.dim() - 1)
        return QParams(self.scale[steps].reshape(shape), self.zero_point[steps].reshape(shape))

"""What a source of (scale, zero point) is."""

from collections.abc import Iterator

import torch
from jaxtyping import Float
from torch import Tensor, nn

from tfmq_exp.quant.functional import qparams_from_range
from tfmq_exp.quant.ranges import include_zero
from tfmq_exp.quant.spec import QParams, QuantSpec


class Source(nn.Module):
    """Gives the scale and zero point for a tensor whose first dimension is the batch."""

    spec: QuantSpec
    per_step: bool = False  # whether every range belongs to one sampling step

    def observe(self, x: Float[Tensor, "batch *rest"]) -> None:
        """Take statistics from a calibration batch. Nothing to do where the scale does not come from data."""

    def forward(self, x: Float[Tensor, "batch *rest"]) -> QParams:
        """The parameters to quantize `x` with, broadcastable against it."""
        raise NotImplementedError

    def uncalibrated(self) -> list[int]:
        """Entries that have seen no data yet and cannot quantize."""
        return []

    def trainable(self) -> Iterator[nn.Parameter]:
        """Parameters that a method may learn."""
        return iter(())


class RunningRange(Source):
    """A table of ranges, each an exponential moving average over the batches that it was shown (arXiv 1712.05877, 3.1).

    The first batch sets a range, later ones move it: lo <- momentum * lo + (1 - momentum) * min of the batch. Scales follow
    at once; only they are part of the state that is saved. NaN marks what has seen no data.
    """

    lo: Tensor
    hi: Tensor
    scale: Tensor
    zero_point: Tensor

    def __init__(self, spec: QuantSpec, entries: int, momentum: float) -> None:
        super().__init__()
        if spec.axis is not None:
            raise ValueError("activations have one range per tensor: spec.axis must be None")
        if not 0 <= momentum < 1:
            raise ValueError(f"momentum must be in [0, 1), got {momentum}")
        self.spec, self.momentum = spec, momentum
        for name in ("lo", "hi", "scale", "zero_point"):
            self.register_buffer(name, torch.full((entries,), torch.nan), persistent=name in ("scale", "zero_point"))

    def update(self, lo: Float[Tensor, "entries"], hi: Float[Tensor, "entries"]) -> None:
        """Move the ranges towards those of a batch; entries that are infinite had no data in it."""
        here = torch.isfinite(lo)
        for running, batch in ((self.lo, lo), (self.hi, hi)):
            moved = self.momentum * running + (1 - self.momentum) * batch
            running.copy_(torch.where(here, torch.where(running.isnan(), batch, moved), running))
        scale, zero_point = qparams_from_range(*include_zero(self.lo, self.hi), self.spec)
        self.scale.copy_(scale)
        self.zero_point.copy_(zero_point)

    def uncalibrated(self) -> list[int]:
        """Entries without a scale."""
        return [int(i) for i in torch.nonzero(self.scale.isnan())]

"""What a source of (scale, zero point) is."""

from collections.abc import Iterator

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from tfmq_exp.core.finite import require_finite
from tfmq_exp.quant.functional import SMALLEST_SCALE, qparams_from_range
from tfmq_exp.quant.observers import MinMax, Observer, include_zero
from tfmq_exp.quant.spec import QParams, QuantSpec


class Source(nn.Module):
    """Gives the scale and zero point for a tensor whose first dimension is the batch."""

    spec: QuantSpec
    needs_data: bool = True  # whether `observe` has to be shown calibration data
    per_step: bool = False  # whether every range belongs to one sampling step
    generates: bool = False  # whether `trainable` is a network, and not the scales themselves

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

    def clamp_parameters(self) -> None:
        """Called after every step of an optimiser on `trainable`."""

    def merged(self) -> "Source":
        """An equal source that is fit for sampling: what can be computed beforehand is."""
        return self


class EMARange(Source):
    """A table of ranges, each an exponential moving average over the batches that it was shown (arXiv 1712.05877, 3.1).

    The first batch sets a range, later ones move it: lo <- momentum * lo + (1 - momentum) * lo of the batch. Scales follow
    at once; only they are part of the state that is saved, and only they can be learned: zero points stay what
    calibration made them. NaN marks what has seen no data.

    Args:
        spec: the grid.
        entries: how many ranges.
        momentum: weight of the past; 0.95 in Q-Diffusion and TFMQ-DM.
        estimator: the range of one batch.
    """

    lo: Tensor
    hi: Tensor
    zero_point: Tensor

    def __init__(self, spec: QuantSpec, entries: int, *, momentum: float, estimator: Observer) -> None:
        super().__init__()
        if spec.axis is not None:
            raise ValueError("activations have one range per tensor: spec.axis must be None")
        if not 0 <= momentum < 1:
            raise ValueError(f"momentum must be in [0, 1), got {momentum}")
        self.spec, self.momentum, self.estimator = spec, momentum, estimator
        for name in ("lo", "hi", "zero_point"):
            self.register_buffer(name, torch.full((entries,), torch.nan), persistent=name == "zero_point")
        self.scale = nn.Parameter(torch.full((entries,), torch.nan), requires_grad=False)

    def show(self, x: Float[Tensor, "batch *rest"], entry_of_row: Int[Tensor, "batch"]) -> None:
        """Move the ranges of the entries that the rows belong to.

        Raises:
            NotFiniteError: values, or the range that the estimator finds, are NaN or infinite, which is no range; a moving
                average would keep it for good.
        """
        lo, hi = torch.full_like(self.lo, torch.inf), torch.full_like(self.hi, torch.inf)
        for entry in sorted({int(i) for i in entry_of_row}):
            rows = x[entry_of_row == entry]
            ends = [end.reshape(()).double() for end in self.estimator(rows, self.spec)]
            # the extremes too: some estimators look at a part of the values
            require_finite(
                torch.stack([*ends, *(end.double() for end in rows.aminmax())]), "the range of an activation"
            )
            lo[entry], hi[entry] = ends
        self.update(lo, hi)

    @torch.no_grad()
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

    def trainable(self) -> Iterator[nn.Parameter]:
        """The scales."""
        yield self.scale

    @torch.no_grad()
    def clamp_parameters(self) -> None:
        """A scale that a step has made negative would turn the grid around."""
        self.scale.clamp_(min=SMALLEST_SCALE)


DEFAULT_OBSERVER = MinMax(widen=False)  # the running range is widened, not each batch's

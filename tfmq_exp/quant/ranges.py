"""Range estimators: from a tensor to the [lo, hi] that its grid should cover.

Every estimator looks at all channels (and all candidates) at once. Each is a small frozen record, called with the tensor
and its spec; lo and hi have the spec's `range_shape` and may be of a wider type than the tensor.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from jaxtyping import Float
from torch import Tensor

from tfmq_exp.quant.functional import fake_quantize, qparams_from_range
from tfmq_exp.quant.spec import QParams, QuantSpec

Range = tuple[Float[Tensor, "*range"], Float[Tensor, "*range"]]


class RangeEstimator(Protocol):
    """Anything that maps a tensor to a range."""

    def __call__(self, x: Float[Tensor, "*shape"], spec: QuantSpec) -> Range:
        """lo and hi with shape `spec.range_shape(x.shape)`."""
        ...


def per_range(x: Float[Tensor, "*shape"], spec: QuantSpec) -> Float[Tensor, "ranges values"]:
    """The tensor as one row per range."""
    return x.reshape(1, -1) if spec.axis is None else x.movedim(spec.axis, 0).flatten(1)


def include_zero(lo: Tensor, hi: Tensor) -> Range:
    """Widen a range so that zero is a point of its grid: padding and ReLU need it, and the zero point fits the bits."""
    return lo.clamp(max=0), hi.clamp(min=0)


@dataclass(frozen=True)
class MinMax:
    """The whole range of the values, widened to include zero."""

    def __call__(self, x: Float[Tensor, "*shape"], spec: QuantSpec) -> Range:
        """lo = min(x, 0), hi = max(x, 0)."""
        rows, shape = per_range(x, spec), spec.range_shape(x.shape)
        return include_zero(rows.amin(dim=1).reshape(shape), rows.amax(dim=1).reshape(shape))


@dataclass(frozen=True)
class LpSearch:
    """The shrunken range whose quantization error has the smallest L_p norm (LAPQ, arXiv 1911.07190; p = 2.4 as in BRECQ).

    `candidates` ranges s * [lo, hi] with s = 1, 1 - shrink, 1 - 2 shrink, ... are tried together; ties keep the widest.

    Args:
        widen: include zero in the range before the search, which keeps the zero point inside the grid. The releases of
            Q-Diffusion and TFMQ-DM do not (False): a one-sided tensor then gets a zero point that no engine can store.
        memory: how many bytes the candidates may take at once; they are split into chunks that fit.
    """

    p: float = 2.4
    candidates: int = 80
    shrink: float = 0.01
    widen: bool = True
    memory: int = 2**28

    def __call__(self, x: Float[Tensor, "*shape"], spec: QuantSpec) -> Range:
        """lo and hi of the best candidate."""
        rows = per_range(x, spec)
        lo, hi = rows.amin(dim=1).double(), rows.amax(dim=1).double()
        if self.widen:
            lo, hi = include_zero(lo, hi)
        factors = 1.0 - self.shrink * torch.arange(self.candidates, dtype=torch.float64, device=x.device)
        low, high = lo[:, None, None] * factors[:, None], hi[:, None, None] * factors[:, None]
        row_spec = QuantSpec(spec.bits, spec.scheme)
        rows_at_once = max(1, self.memory // (4 * rows.element_size() * rows.shape[1] * self.candidates))
        best = torch.cat(
            [
                self.errors(values[:, None], qparams_from_range(a, b, row_spec), row_spec).argmin(dim=1)
                for values, a, b in zip(*(part.split(rows_at_once) for part in (rows, low, high)), strict=True)
            ]
        )
        shape = spec.range_shape(x.shape)
        return (lo * factors[best]).reshape(shape), (hi * factors[best]).reshape(shape)

    def errors(self, values: Tensor, q: QParams, spec: QuantSpec) -> Float[Tensor, "ranges candidates"]:
        """Mean p-th power of the quantization error of every candidate."""
        return (fake_quantize(values, q, spec) - values).abs_().pow_(self.p).mean(dim=2)

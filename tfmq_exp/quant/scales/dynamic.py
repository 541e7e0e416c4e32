"""Dynamic quantization: the range of the very tensor that is quantized."""

from typing import Literal

from jaxtyping import Float
from torch import Tensor

from tfmq_exp.quant.functional import qparams_from_range
from tfmq_exp.quant.observers import include_zero
from tfmq_exp.quant.qat.base import IntRangeKind, range_ratio
from tfmq_exp.quant.scales.base import Source
from tfmq_exp.quant.spec import QParams, QuantSpec


class Dynamic(Source):
    """Min and max at run time: exact ranges without calibration, for a pass over every activation.

    Args:
        spec: the grid.
        per: `sample`, a range for each row of the batch; or `tensor`, one for all of them, which makes an image depend on
            what it is batched with.
        levels: of a form that leaves codes out: the largest value stands on the largest code that is used.
    """

    needs_data = False

    def __init__(self, spec: QuantSpec, per: Literal["tensor", "sample"], levels: IntRangeKind = "full") -> None:
        super().__init__()
        if per not in ("tensor", "sample"):
            raise ValueError(f"dynamic quantization is per tensor or sample, got {per!r}")
        self.spec, self.per = spec, per
        self.widened = 1.0 if levels == "full" else range_ratio(spec, levels)

    def forward(self, x: Float[Tensor, "batch *rest"]) -> QParams:
        """Shape [batch, 1, ...], or [1, 1, ...] for the whole tensor."""
        dims = tuple(range(0 if self.per == "tensor" else 1, x.dim()))
        lo, hi = x.detach().aminmax() if self.per == "tensor" else (x.detach().amin(dims), x.detach().amax(dims))
        shape = (-1,) + (1,) * (x.dim() - 1)
        lo, hi = include_zero(lo.reshape(shape), hi.reshape(shape))
        return qparams_from_range(lo * self.widened, hi * self.widened, self.spec)

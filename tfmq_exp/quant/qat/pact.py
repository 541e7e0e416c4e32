"""Parameterized Clipping Activation (PACT, arXiv 1805.06085)."""

from collections.abc import Mapping
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from tfmq_exp.quant.qat.base import IntRange, IntRangeKind, QATQuantizeFn
from tfmq_exp.quant.qat.lsq import Lsq
from tfmq_exp.quant.qat.ste import STERange, ste_quantize


@dataclass(frozen=True)
class Pact(QATQuantizeFn):
    """The clip value alpha = s high learns from what is clipped alone, and shrinks under its L2 penalty.

    d/d alpha is 1 for x >= alpha, on a signed grid -1 for x <= -alpha, 0 elsewhere.
    """

    levels: IntRangeKind = "narrow"
    decay: float = 1e-4

    def __call__(
        self, x: Float[Tensor, "*shape"], scale: Tensor, grid: IntRange, further: Mapping[str, Tensor]
    ) -> Float[Tensor, "*shape"]:
        """Values s round(clip(x / s))."""
        return ste_quantize(x, scale, STERange(grid.low, grid.high, inside="none"))

    def for_inference(self) -> Lsq:
        """The grid alone."""
        return Lsq(self.levels)

"""Parameterized Clipping Activation (PACT, arXiv 1805.06085)."""

from dataclasses import dataclass

from torch import Tensor

from tfmq_exp.quant.qat.base import Extra, IntRange, IntRangeKind, QATQuantizeFn
from tfmq_exp.quant.qat.lsq import Lsq
from tfmq_exp.quant.qat.ste import ste_quantize


@dataclass(frozen=True)
class Pact(QATQuantizeFn):
    """The clip value alpha = s qmax learns from what is clipped alone, and shrinks under its L2 penalty.

    d/d alpha is 1 for x >= alpha, for a signed range -1 for x <= -alpha, 0 elsewhere.
    """

    int_range: IntRangeKind = "narrow"
    decay: float = 1e-4

    def __call__(self, x: Tensor, scale: Tensor, ints: IntRange, extra: Extra) -> Tensor:
        return ste_quantize(x, scale, ints, only_clipped=True)

    def for_inference(self) -> Lsq:
        return Lsq(self.int_range)

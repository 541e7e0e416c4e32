"""Learned Step Size Quantization (LSQ, arXiv 1902.08153)."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from tfmq_exp.core.validate import SWITCH, check_fields
from tfmq_exp.quant.qat.base import Extra, IntRange, QATQuantizeFn
from tfmq_exp.quant.qat.ste import ste_quantize


@dataclass(frozen=True)
class Lsq(QATQuantizeFn):
    """The scale learns from rounding errors of values in the range and from all that is clipped (eq. 3).

    Args:
        int_range, decay: see `QATQuantizeFn`.
        scaled: multiply the scale's gradient by 1 / sqrt(values * qmax) (section 2.2). TDQ's release does not, for activations.
    """

    kind: ClassVar[str] = "lsq"
    scaled: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_fields(self, scaled=SWITCH)

    def __call__(self, x: Tensor, scale: Tensor, ints: IntRange, extra: Extra) -> Tensor:
        factor = (ints.num_values * ints.qmax) ** -0.5 if self.scaled else 1.0
        return ste_quantize(x, scale, ints, factor=factor)

    def for_inference(self) -> "Lsq":
        return Lsq(self.int_range)

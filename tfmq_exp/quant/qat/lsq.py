"""Learned Step Size Quantization (LSQ, arXiv 1902.08153)."""

from collections.abc import Mapping
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from tfmq_exp.core.validate import SWITCH, check_fields
from tfmq_exp.quant.qat.base import IntRange, QATQuantizeFn
from tfmq_exp.quant.qat.ste import STERange, ste_quantize


@dataclass(frozen=True)
class Lsq(QATQuantizeFn):
    """The step learns from rounding errors inside the grid and from all that is clipped (eq. 3).

    Args:
        levels, decay: see `QATQuantizeFn`.
        scaled: multiply the step's gradient by 1 / sqrt(values * high) (section 2.2). TDQ's release does not, for activations.
    """

    scaled: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_fields(self, scaled=SWITCH)

    def __call__(
        self, x: Float[Tensor, "*shape"], scale: Tensor, grid: IntRange, further: Mapping[str, Tensor]
    ) -> Float[Tensor, "*shape"]:
        """Values s round(clip(x / s))."""
        factor = (grid.values * grid.high) ** -0.5 if self.scaled else 1.0
        return ste_quantize(x, scale, STERange(grid.low, grid.high, factor))

    def for_inference(self) -> "Lsq":
        """The grid alone."""
        return Lsq(self.levels)

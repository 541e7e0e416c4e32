"""DuQ, the quantizer of PROFIT (arXiv 2008.04693): input and output steps apart."""

from collections.abc import Mapping
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from tfmq_exp.quant.functional import round_ste
from tfmq_exp.quant.qat.base import ExtraParam, IntRange, IntRangeKind, QATQuantizeFn


@dataclass(frozen=True)
class Duq(QATQuantizeFn):
    """c round(clip(x / a, -1, 1) L) / L with a = s L: codes are made with one range, and stand for another.

    The output's range is c = gain * a; the ratio is what is trained, so that c follows an `a` that depends on the timestep.
    """

    levels: IntRangeKind = "narrow"

    def further(self) -> Mapping[str, ExtraParam]:
        """The gain c / a, 1 at the start."""
        return {"gain": ExtraParam(1.0, 1e-3, 1e3)}

    def output_scale(self, scale: Tensor, further: Mapping[str, Tensor]) -> Tensor:
        """The output's step c / L."""
        return scale * further["gain"]

    def __call__(
        self, x: Float[Tensor, "*shape"], scale: Tensor, grid: IntRange, further: Mapping[str, Tensor]
    ) -> Float[Tensor, "*shape"]:
        """Gradients pass through rounding, so that of `a` inside the grid is - c x / a^2 at constant c."""
        return round_ste((x / scale).clamp(grid.low, grid.high)) * self.output_scale(scale, further)

    def for_inference(self) -> "Duq":
        """Both steps."""
        return Duq(self.levels)

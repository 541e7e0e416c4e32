"""DuQ, the quantizer of PROFIT (arXiv 2008.04693): separate scales of input and output."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from tfmq_exp.quant.functional import round_ste
from tfmq_exp.quant.qat.base import Extra, ExtraParam, IntRange, IntRangeKind, QATQuantizeFn


@dataclass(frozen=True)
class Duq(QATQuantizeFn):
    """c round(clip(x / a, -1, 1) L) / L with a = s L: one range makes the codes, another gives their real values.

    The output's range is c = gain * a; the ratio is trained, so that c follows an `a` that depends on the timestep.
    """

    kind: ClassVar[str] = "duq"
    int_range: IntRangeKind = "narrow"

    def extra_params(self) -> Mapping[str, ExtraParam]:
        return {"gain": ExtraParam(1.0, 1e-3, 1e3)}

    def output_scale(self, scale: Tensor, extra: Extra) -> Tensor:
        return scale * extra["gain"]

    def __call__(self, x: Tensor, scale: Tensor, ints: IntRange, extra: Extra) -> Tensor:
        # gradients pass through rounding, so that of `a` inside the range is - c x / a^2 at constant c
        return round_ste((x / scale).clamp(ints.qmin, ints.qmax)) * self.output_scale(scale, extra)

    def for_inference(self) -> "Duq":
        return Duq(self.int_range)

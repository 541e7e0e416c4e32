"""Quantization Interval Learning (QIL, arXiv 1808.05779): an interval of magnitudes with a centre and a distance."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tfmq_exp.core.validate import SWITCH, check_fields
from tfmq_exp.quant.functional import round_ste
from tfmq_exp.quant.qat.base import Extra, ExtraParam, IntRange, IntRangeKind, QATQuantizeFn

SMALLEST = 1e-12  # below it a power of the transformed magnitude has no usable logarithm


@dataclass(frozen=True)
class Qil(QATQuantizeFn):
    """Magnitudes below c - d become 0, those above c + d saturate, between them codes are uniform (eq. 1 to 5).

    c + d = s qmax is given by the scale; `pruned` = (c - d) / (c + d) is trained, 0 at the start, where c = d. The paper's
    values lie in [-1, 1] and are scaled by the next layer's normalisation; here c + d restores them.

    Args:
        int_range, decay: see `QATQuantizeFn`. The range must reach as far below zero as above.
        learn_gamma: train an exponent that bends the interval, for weights alone: integers hide it afterwards.

    Raises:
        ValueError: the full integer range, which has one more code below zero.
    """

    kind: ClassVar[str] = "qil"
    int_range: IntRangeKind = "narrow"
    learn_gamma: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_fields(self, learn_gamma=SWITCH)
        if self.int_range == "full":
            raise ValueError("QIL's range is symmetric: int_range must be narrow or tdq_release, got 'full'")

    def extra_params(self) -> Mapping[str, ExtraParam]:
        gamma = {"gamma": ExtraParam(1.0, 0.1, 10.0)} if self.learn_gamma else {}
        return {"pruned": ExtraParam(0.0, 0.0, 0.99), **gamma}

    def transformed(self, x: Tensor, scale: Tensor, ints: IntRange, extra: Extra) -> Tensor:
        """The transformer, in units of codes: from 0 at c - d to qmax at c + d. The arguments are those of `__call__`."""
        pruned = extra["pruned"]
        reach = (((x / scale).abs() - pruned * ints.qmax) / (1 - pruned)).clamp(0, ints.qmax)
        if not self.learn_gamma:
            return reach
        share = (reach / ints.qmax).clamp(min=SMALLEST)
        return torch.where(reach > 0, ints.qmax * share.pow(extra["gamma"]), 0)

    def codes(self, x: Tensor, scale: Tensor, ints: IntRange, extra: Extra) -> Tensor:
        return self.transformed(x, scale, ints, extra).round() * self.sign(x, ints)

    def sign(self, x: Tensor, ints: IntRange) -> Tensor:
        """Sign of x; 0 for negative x under an unsigned range."""
        return x.sign() if ints.qmin < 0 else (x > 0).to(x.dtype)

    def __call__(self, x: Tensor, scale: Tensor, ints: IntRange, extra: Extra) -> Tensor:
        # gradients pass through rounding, and through the transformer to the scale and to `pruned`
        return round_ste(self.transformed(x, scale, ints, extra)) * self.sign(x, ints) * scale

    def for_inference(self) -> "Qil":
        return Qil(self.int_range, learn_gamma=self.learn_gamma)

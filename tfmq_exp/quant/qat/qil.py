"""Quantization Interval Learning (QIL, arXiv 1808.05779): an interval with a centre and a distance."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from tfmq_exp.core.validate import SWITCH, check_fields
from tfmq_exp.quant.functional import round_ste
from tfmq_exp.quant.qat.base import ExtraParam, IntRange, IntRangeKind, QATQuantizeFn

SMALLEST = 1e-12  # below it a power of the transformed magnitude has no usable logarithm


@dataclass(frozen=True)
class Qil(QATQuantizeFn):
    """Magnitudes below c - d become 0, those above c + d saturate, between them the grid is uniform (eq. 1 to 5).

    c + d = s high is the source's; `pruned` = (c - d) / (c + d) is trained, 0 at the start, where c = d. The paper's values
    lie in [-1, 1] and are scaled by the next layer's normalisation; here c + d restores them.

    Args:
        levels, decay: see `QATQuantizeFn`. The ends of the grid must lie as far below zero as above.
        learn_gamma: bend the interval by an exponent that is trained, for weights alone: integers hide it afterwards.

    Raises:
        ValueError: all levels of a grid, which has one more below zero.
    """

    levels: IntRangeKind = "narrow"
    learn_gamma: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_fields(self, learn_gamma=SWITCH)
        if self.levels == "full":
            raise ValueError("QIL's grid is as long below zero as above: levels must be narrow or official, got 'full'")

    def further(self) -> Mapping[str, ExtraParam]:
        """The share that is pruned, and gamma."""
        gamma = {"gamma": ExtraParam(1.0, 0.1, 10.0)} if self.learn_gamma else {}
        return {"pruned": ExtraParam(0.0, 0.0, 0.99), **gamma}

    def transformed(self, x: Tensor, scale: Tensor, grid: IntRange, further: Mapping[str, Tensor]) -> Tensor:
        """The transformer, in units of codes: from 0 at c - d to `high` at c + d. Never negative."""
        pruned = further["pruned"]
        reach = (((x / scale).abs() - pruned * grid.high) / (1 - pruned)).clamp(0, grid.high)
        if not self.learn_gamma:
            return reach
        share = (reach / grid.high).clamp(min=SMALLEST)
        return torch.where(reach > 0, grid.high * share.pow(further["gamma"]), 0)

    def codes(
        self, x: Float[Tensor, "*shape"], scale: Tensor, grid: IntRange, further: Mapping[str, Tensor]
    ) -> Float[Tensor, "*shape"]:
        """Integers with the sign of x."""
        return self.transformed(x, scale, grid, further).round() * self.sign(x, grid)

    def sign(self, x: Tensor, grid: IntRange) -> Tensor:
        """That of x; an unsigned grid has nothing below zero."""
        return x.sign() if grid.low < 0 else (x > 0).to(x.dtype)

    def __call__(
        self, x: Float[Tensor, "*shape"], scale: Tensor, grid: IntRange, further: Mapping[str, Tensor]
    ) -> Float[Tensor, "*shape"]:
        """Gradients pass through rounding, and through the transformer to the step and to `pruned`."""
        return round_ste(self.transformed(x, scale, grid, further)) * self.sign(x, grid) * scale

    def for_inference(self) -> "Qil":
        """The interval."""
        return Qil(self.levels, learn_gamma=self.learn_gamma)

"""Grids as the programs of papers place them, where those differ from `qparams_from_range`. Each difference is an option."""

from dataclasses import dataclass
from typing import Annotated

import torch
from jaxtyping import Float
from torch import Tensor

from tfmq_exp.core.validate import AMOUNT, Checked
from tfmq_exp.quant.functional import SMALLEST_SCALE
from tfmq_exp.quant.spec import QParams, QuantSpec


@dataclass(frozen=True)
class ReleasedGrid(Checked):
    """Scale and zero point in the precision of the range, as research code computes them; a `Place`.

    affine: scale = (hi - lo) / (levels - 1), zero point = round(-lo / scale), outside the integers for a range without 0;
    symmetric: scale = max(|lo|, |hi|) / (levels / 2 - 1); unsigned: scale = hi / (levels - 1). No scale is below
    `SMALLEST_SCALE`, which ranges of one value need.

    Args:
        smallest_range: hi - lo, or the largest magnitude, counts as at least that: 1e-5 in Q-DiT (Juanerx/Q-DiT 519d24a).
        smallest_scale: no scale is below it: 1e-6 in ViDiT-Q (thu-nics/ViDiT-Q 44126bd).
        all_or_none: one scale below `smallest_scale` sets all scales to it, as in ViDiT-Q: a token of zeros ruins the tensor.
        clamp_zero_point: into the integers, as in Q-DiT, which clips ranges without 0 at the wrong place.
        all_levels: symmetric scale = (hi - lo) / (levels - 1), with the range widened to [-max, max] only if lo < 0, and an
            empty range as [-1, 1]: GPTQ's released code. A range without negative values loses its upper half.
    """

    smallest_range: Annotated[float, AMOUNT] = 0.0
    smallest_scale: Annotated[float, AMOUNT] = 0.0
    all_or_none: bool = False
    clamp_zero_point: bool = False
    all_levels: bool = False

    def __call__(self, lo: Float[Tensor, "*range"], hi: Float[Tensor, "*range"], spec: QuantSpec) -> QParams:
        if self.all_levels:
            lo, hi = unit_if_empty(lo, hi)
        scale = self.scale(lo, hi, spec)
        zero_point = (-lo / scale).round() if spec.scheme == "affine" else torch.zeros_like(scale)
        return QParams(scale, zero_point.clamp(spec.qmin, spec.qmax) if self.clamp_zero_point else zero_point)

    def scale(
        self, lo: Float[Tensor, "*range"], hi: Float[Tensor, "*range"], spec: QuantSpec
    ) -> Float[Tensor, "*range"]:
        """Distance of two neighbouring values."""
        steps = spec.levels - 1
        if spec.scheme == "unsigned":
            reach = hi
        elif spec.scheme == "affine":
            reach = hi - lo
        elif self.all_levels:
            largest = torch.maximum(lo.abs(), hi)
            reach = torch.where(lo < 0, 2 * largest, largest)
        else:
            reach, steps = torch.maximum(lo.abs(), hi.abs()), spec.qmax
        scale = reach.clamp(min=self.smallest_range) / steps
        if self.all_or_none and bool((scale < self.smallest_scale).any()):
            return torch.full_like(scale, self.smallest_scale)
        smallest = max(SMALLEST_SCALE, torch.finfo(scale.dtype).tiny)  # float16 has no 1e-8
        return scale.clamp(min=max(self.smallest_scale, smallest))


def unit_if_empty(lo: Float[Tensor, "*range"], hi: Float[Tensor, "*range"]) -> tuple[Tensor, Tensor]:
    """Ranges, with [-1, 1] in place of [0, 0]."""
    empty = (lo == 0) & (hi == 0)
    return lo.masked_fill(empty, -1), hi.masked_fill(empty, 1)

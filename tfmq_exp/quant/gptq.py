"""GPTQ (arXiv 2210.17323): integers of a weight in closed form, from the second moments of its layer's inputs.

The output error of a linear layer is quadratic in its weight: |(W - Q) X|^2 = tr (W - Q) H (W - Q)^T with H = X X^T. Columns of W
are rounded one by one, and what each error costs is repaid by the columns that are still real.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from tfmq_exp.quant.functional import quantize
from tfmq_exp.quant.spec import QParams, QuantSpec

linalg: Any = torch.linalg  # has no types
Moments = Float[Tensor, "groups columns columns"]
Weight = Float[Tensor, "groups rows columns"]


def gptq(
    weight: Weight,
    moments: Moments,
    qparams: QParams,
    spec: QuantSpec,
    *,
    damping: float = 0.01,
    activation_order: bool = True,
    block: int = 128,
) -> Weight:
    """Integer codes of a weight that keep the outputs close to those of the real weight.

    Args:
        weight: a matrix for each group of a convolution; columns are inputs.
        moments: H of the inputs of each group, up to a factor; float64 where it is ill-conditioned.
        qparams: scale and zero point, which broadcast against the weight.
        spec: the integers.
        damping: added to H's diagonal, as a share of its mean.
        activation_order: round columns of the largest inputs first, which have the others to repay their error.
        block: columns whose errors are repaid together in the columns after them; changes the time alone.

    Returns:
        codes within the spec's integers, as floats.

    Raises:
        ValueError: moments that are not finite, or not positive definite even when damped.
    """
    groups, rows, columns = weight.shape
    order = torch.arange(columns, device=weight.device).expand(groups, columns)
    if activation_order:
        order = moments.diagonal(dim1=1, dim2=2).argsort(dim=1, descending=True, stable=True)
    at = order[:, None, :].expand(groups, rows, columns)
    scale, zero_point = (part.expand(groups, rows, columns).gather(2, at) for part in qparams)
    left = weight.to(moments.dtype).gather(2, at)
    codes = torch.empty_like(left)
    factor = inverse_factor(permuted(moments, order), damping)
    for start, end in pairwise([*range(0, columns, block), columns]):
        codes[:, :, start:end] = round_block(left, factor, QParams(scale, zero_point), spec, start, end)
    return torch.empty_like(codes).scatter_(2, at, codes).to(weight.dtype)


def round_block(left: Weight, factor: Moments, qparams: QParams, spec: QuantSpec, start: int, end: int) -> Weight:
    """Codes of the columns start .. end - 1; `left`, what is left to round, changes: their errors are repaid after them.

    Args:
        left: weight with the errors of the columns before `start` repaid.
        factor: `inverse_factor` of the moments.
        qparams: scale and zero point of every value of the weight.
        spec: the integers.
        start: first column.
        end: one more than the last column.
    """
    groups, rows, _ = left.shape
    codes, errors = (left.new_zeros(groups, rows, end - start) for _ in range(2))
    for j in range(start, end):
        place = QParams(*(part[:, :, j] for part in qparams))
        codes[:, :, j - start] = quantize(left[:, :, j], place, spec)
        rounded = (codes[:, :, j - start] - place.zero_point) * place.scale
        error = (left[:, :, j] - rounded) / factor[:, None, j, j]
        left[:, :, j:end] -= error[:, :, None] * factor[:, None, j, j:end]
        errors[:, :, j - start] = error
    left[:, :, end:] -= errors @ factor[:, start:end, end:]
    return codes


@dataclass(frozen=True)
class ColumnGroups:
    """Groups of consecutive columns, whose ranges are taken when their turn comes, from weights that repay earlier errors.

    Args:
        size: columns of a group; the last group may have fewer.
        place: from the values of a group, [groups, rows, columns], to scale and zero point, [groups, rows, 1].
        before_block: take the ranges from the weight as it was before the block in which the group begins: errors of that
            block's own columns have not reached it, as in released programs (IST-DASLab/gptq, and after it Juanerx/Q-DiT).
    """

    size: int
    place: Callable[[Weight], QParams]
    before_block: bool = False

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ValueError(f"a group needs at least 1 column, got {self.size}")


def gptq_in_groups(
    weight: Weight,
    moments: Moments,
    ranges: ColumnGroups,
    spec: QuantSpec,
    *,
    damping: float = 0.01,
    block: int = 128,
) -> tuple[Weight, QParams]:
    """Codes as `gptq`'s, and scale and zero point of every value, where consecutive columns have ranges of their own.

    Columns are rounded in their order. `gptq` has another order for groups whose ranges are fixed before: its scale and zero
    point may differ from column to column.

    Args:
        weight: a matrix for each group of a convolution; columns are inputs.
        moments: H of the inputs of each group, up to a factor.
        ranges: which columns share one, and how it is placed.
        spec: the integers.
        damping: added to H's diagonal, as a share of its mean.
        block: columns whose errors are repaid together in the columns after them; changes the time alone, unless
            `before_block`.

    Raises:
        ValueError: moments that are not finite, or not positive definite even when damped.
    """
    columns = weight.shape[2]
    factor = inverse_factor(moments, damping)
    left = weight.to(moments.dtype, copy=True)
    codes, scale, zero_point = (torch.empty_like(left) for _ in range(3))
    begins = [j for j in range(columns) if not j % block or not (j % ranges.size or ranges.before_block)]
    for start, end in pairwise([*begins, columns]):
        for first in range(start + -start % ranges.size, end, ranges.size):
            own = slice(first, first + ranges.size)
            scale[:, :, own], zero_point[:, :, own] = ranges.place(left[:, :, own])
        codes[:, :, start:end] = round_block(left, factor, QParams(scale, zero_point), spec, start, end)
    return codes.to(weight.dtype), QParams(scale.to(weight.dtype), zero_point.to(weight.dtype))


def without_dead_inputs(weight: Weight, moments: Moments) -> tuple[Weight, Moments]:
    """Weight 0 and moment 1 for inputs that are always 0, as released programs have it before the damping (IST-DASLab/gptq).

    Otherwise `gptq` keeps the weights of such inputs, and leaves them out of the mean that damps.
    """
    dead = moments.diagonal(dim1=1, dim2=2) == 0
    counted = moments.clone()
    counted.diagonal(dim1=1, dim2=2).add_(dead)
    return weight.masked_fill(dead[:, None], 0), counted


def permuted(moments: Moments, order: Tensor) -> Moments:
    """Rows and columns of H in another order."""
    columns = moments.shape[-1]
    rows = moments.gather(1, order[:, :, None].expand(-1, -1, columns))
    return rows.gather(2, order[:, None, :].expand(-1, columns, -1))


def inverse_factor(moments: Moments, damping: float) -> Moments:
    """Upper Cholesky factor of the damped H's inverse. Inputs that are always 0 count as ones of their own.

    Raises:
        ValueError: no such factor.
    """
    damped = moments.clone()
    diagonal = damped.diagonal(dim1=1, dim2=2)
    mean = diagonal.mean(dim=1, keepdim=True)
    diagonal.add_(damping * mean + torch.where(diagonal == 0, mean.clamp(min=1e-30), 0.0))
    for dtype in (moments.dtype, torch.float64):  # again in float64 where float32 is not enough
        try:
            # no name for the first factor, whose memory the second one needs
            factor = linalg.cholesky(torch.cholesky_inverse(linalg.cholesky(damped.to(dtype))), upper=True)
        except linalg.LinAlgError:
            continue
        if bool(factor.isfinite().all()):
            return factor.to(moments.dtype)
    raise ValueError(f"the inputs' second moments are not positive definite with a damping of {damping}: raise it")

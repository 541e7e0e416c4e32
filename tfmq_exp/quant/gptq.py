"""GPTQ (arXiv 2210.17323): integers of a weight in closed form, from the second moments of its layer's inputs.

The output error of a linear layer is quadratic in its weight: |(W - Q) X|^2 = tr (W - Q) H (W - Q)^T with H = X X^T. Columns of W
are rounded one by one, and what each error costs is repaid by the columns that are still real.
"""

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
    for start in range(0, columns, block):
        end = min(start + block, columns)
        errors = left.new_zeros(groups, rows, end - start)
        for j in range(start, end):
            place = QParams(scale[:, :, j], zero_point[:, :, j])
            codes[:, :, j] = quantize(left[:, :, j], place, spec)
            rounded = (codes[:, :, j] - place.zero_point) * place.scale
            error = (left[:, :, j] - rounded) / factor[:, None, j, j]
            left[:, :, j:end] -= error[:, :, None] * factor[:, None, j, j:end]
            errors[:, :, j - start] = error
        left[:, :, end:] -= errors @ factor[:, start:end, end:]
    return torch.empty_like(codes).scatter_(2, at, codes).to(weight.dtype)


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

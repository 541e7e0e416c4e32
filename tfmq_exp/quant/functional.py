"""Uniform quantization: range to (scale, zero point), reals to integers and back.

TFMQ-DM (arXiv 2311.16503), eq. 4 and 5; rounding is half to even, as in every engine that executes such grids.
"""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from tfmq_exp.quant.spec import QParams, QuantSpec

SMALLEST_SCALE = 1e-8  # of an all-zero tensor, whose range is empty

Rounding = Callable[[Tensor], Tensor]


def round_ste(x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Round half to even; the gradient passes straight through (arXiv 1308.3432)."""
    return x + (x.round() - x).detach() if x.requires_grad else x.round()


def qparams_from_range(lo: Float[Tensor, "*range"], hi: Float[Tensor, "*range"], spec: QuantSpec) -> QParams:
    """The grid that just covers [lo, hi].

    affine: scale = (hi - lo) / (levels - 1), zero point = round(-lo / scale), inside the grid whenever lo <= 0 <= hi;
    symmetric: scale = 2 max(|lo|, |hi|) / (levels - 2); unsigned: scale = hi / (levels - 1).
    Computed in double precision and stored as float32, which is what engines store.
    """
    low, high = lo.double(), hi.double()
    if spec.scheme == "symmetric":
        scale = 2 * torch.maximum(low.abs(), high.abs()) / (spec.levels - 2)
    elif spec.scheme == "unsigned":
        scale = high / (spec.levels - 1)
    else:
        scale = (high - low) / (spec.levels - 1)
    scale = scale.float().clamp(min=SMALLEST_SCALE)
    zero_point = (-low.float() * scale.reciprocal()).round() if spec.scheme == "affine" else torch.zeros_like(scale)
    return QParams(scale, zero_point)


def quantize(
    x: Float[Tensor, "*shape"], q: QParams, spec: QuantSpec, rounding: Rounding = round_ste
) -> Float[Tensor, "*shape"]:
    """Integer codes of `x` (as floats), clamped to the grid. `rounding` is given x / scale."""
    return (rounding(x / q.scale) + q.zero_point).clamp(spec.qmin, spec.qmax)


def dequantize(codes: Float[Tensor, "*shape"], q: QParams) -> Float[Tensor, "*shape"]:
    """The real numbers that the codes stand for."""
    return q.scale * (codes - q.zero_point)


def fake_quantize(
    x: Float[Tensor, "*shape"], q: QParams, spec: QuantSpec, rounding: Rounding = round_ste
) -> Float[Tensor, "*shape"]:
    """`dequantize` after `quantize`: the nearest point of the grid, still a real number (simulated quantization)."""
    learning = torch.is_grad_enabled() and (x.requires_grad or q.scale.requires_grad)
    if rounding is round_ste and not learning:  # the same operations without a new tensor for each
        codes = (x / q.scale).round_().add_(q.zero_point).clamp_(spec.qmin, spec.qmax)
        return codes.sub_(q.zero_point).mul_(q.scale)
    return dequantize(quantize(x, q, spec, rounding), q)

"""Uniform quantization: range to (scale, zero point), reals to integers and back.

TFMQ-DM (arXiv 2311.16503), eq. 4 and 5; rounding is half to even, as in every engine that executes such integers. Gradients of
rounding, clip value and scale are straight-through estimators.
"""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from tfmq_exp.quant.spec import IntRange, QParams, QuantSpec

SMALLEST_SCALE = 1e-8  # of an all-zero tensor, whose range is empty

Rounding = Callable[[Tensor], Tensor]


def round_ste(x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Round half to even; the gradient passes straight through (arXiv 1308.3432)."""
    return x + (x.round() - x).detach() if x.requires_grad else x.round()


def qparams_from_range(lo: Float[Tensor, "*range"], hi: Float[Tensor, "*range"], spec: QuantSpec) -> QParams:
    """Scale and zero point whose integers just cover [lo, hi].

    affine: scale = (hi - lo) / (levels - 1), zero point = round(-lo / scale), inside the integer range whenever lo <= 0 <= hi;
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
    """Integer codes of `x` (as floats), clamped to the spec's range; `q` broadcasts against `x`."""
    return (rounding(x / q.scale) + q.zero_point).clamp(spec.qmin, spec.qmax)


def dequantize(codes: Float[Tensor, "*shape"], q: QParams) -> Float[Tensor, "*shape"]:
    """Real values of integer codes."""
    return q.scale * (codes - q.zero_point)


def fake_quantize(
    x: Float[Tensor, "*shape"], q: QParams, spec: QuantSpec, rounding: Rounding = round_ste
) -> Float[Tensor, "*shape"]:
    """Simulated quantization: `dequantize` after `quantize`; straight-through gradients to `x` and to the scale by default."""
    if rounding is not round_ste:
        return dequantize(quantize(x, q, spec, rounding), q)
    if torch.is_grad_enabled() and (x.requires_grad or q.scale.requires_grad):
        return _FakeQuantize.apply(x, q.scale, q.zero_point, spec)  # type: ignore[no-any-return]
    # the same operations without a new tensor for each
    codes = (x / q.scale).round_().add_(q.zero_point).clamp_(spec.qmin, spec.qmax)
    return codes.sub_(q.zero_point).mul_(q.scale)


class _FakeQuantize(torch.autograd.Function):
    """Rounding to nearest with its straight-through gradients written out; autograd's graph takes twice the time.

    To x: 1 inside the range, 0 outside. To the scale: round(x / s) - x / s inside, code - zero point outside (LSQ, eq. 3).
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, zero_point: Tensor, spec: QuantSpec) -> Tensor:
        scaled = x / scale
        rounded = scaled.round().add_(zero_point)
        steps = rounded.clamp(spec.qmin, spec.qmax)
        inside = rounded.eq_(steps)  # 1 where nothing was clamped
        steps.sub_(zero_point)
        ctx.scale_shape = scale.shape
        ctx.save_for_backward(inside, torch.addcmul(steps, scaled, inside, value=-1) if scale.requires_grad else None)
        return steps.mul_(scale)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        inside, slope = ctx.saved_tensors
        to_scale = (grads[0] * slope).sum_to_size(ctx.scale_shape) if slope is not None else None
        return (grads[0] * inside if ctx.needs_input_grad[0] else None), to_scale, None, None


def ste_quantize(
    x: Float[Tensor, "*shape"],
    scale: Tensor,
    ints: IntRange,
    noise: Float[Tensor, "*shape"] | None = None,
    factor: float = 1.0,
    only_clipped: bool = False,
) -> Float[Tensor, "*shape"]:
    """S round(clip(x / s)); with noise x + s noise inside the range, and its ends outside.

    Gradient of x: 1 inside, 0 outside. Of s: round(x / s) - x / s or the noise inside, the end of the range outside.
    Only `x` is saved for the backward pass; the network keeps it anyway.

    Args:
        x: values.
        scale: broadcasts against `x`.
        ints: the integer range.
        noise: added to x / s in place of rounding.
        factor: multiplies the scale's gradient.
        only_clipped: only what is clipped moves the scale.
    """
    if torch.is_grad_enabled() and (x.requires_grad or scale.requires_grad):
        return _STEQuantize.apply(x, scale, noise, ints, factor, only_clipped)  # type: ignore[no-any-return]
    return rounded(x / scale, ints, noise).mul_(scale)


def within_range(u: Tensor, ints: IntRange) -> Tensor:
    """Mask of the elements strictly inside the integer range (LSQ, arXiv 1902.08153, eq. 3)."""
    return (u > ints.qmin) & (u < ints.qmax)


def rounded(u: Tensor, ints: IntRange, noise: Tensor | None) -> Tensor:
    """U = x / s clipped and rounded, or with noise, in a new tensor."""
    clipped = u.clamp(ints.qmin, ints.qmax)
    return clipped.round_() if noise is None else torch.where(within_range(u, ints), u + noise, clipped)


class _STEQuantize(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, noise: Tensor | None, *settings: Any) -> Tensor:
        ctx.settings = settings
        ctx.save_for_backward(x, scale, noise)
        return rounded(x / scale, settings[0], noise).mul_(scale)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, scale, noise = ctx.saved_tensors
        ints, factor, only_clipped = ctx.settings
        u = x / scale
        within = within_range(u, ints)
        to_x = grads[0] * within if ctx.needs_input_grad[0] else None
        if not ctx.needs_input_grad[1]:
            return to_x, *(None,) * 5
        slope = u.clamp(ints.qmin, ints.qmax)
        if only_clipped:
            slope.masked_fill_(within, 0)
        else:
            slope = torch.where(within, u.round().sub_(u) if noise is None else noise, slope)
        return to_x, (grads[0] * slope).sum_to_size(scale.shape) * factor, *(None,) * 4

"""Quantization with a trained scale, with the gradients of clip value and scale written out (straight-through estimators).

Only `x` is saved for the backward pass; the network keeps it anyway.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from tfmq_exp.quant.qat.base import IntRange


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
    """(x, s, noise) -> quantized values."""

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

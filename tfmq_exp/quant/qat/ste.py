"""Quantization with a trained scale, with the gradients of clip value and scale written out (straight-through estimators).

Only `x` is saved for the backward pass; the network keeps it anyway.
"""

from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor


class STERange(NamedTuple):
    """Integer range and gradient rule of a scale.

    Args:
        qmin, qmax: ends of the range.
        factor: multiplies the scale's gradient.
        inside: its part from values inside the range: `rounding`, round(x / s) - x / s or the noise in its place; `none`, so
            that only what is clipped moves the scale.
    """

    qmin: int
    qmax: int
    factor: float = 1.0
    inside: Literal["rounding", "none"] = "rounding"


def ste_quantize(
    x: Float[Tensor, "*shape"], scale: Tensor, ste: STERange, noise: Float[Tensor, "*shape"] | None = None
) -> Float[Tensor, "*shape"]:
    """S round(clip(x / s)); with noise x + s noise inside the range, and its ends outside.

    Gradient of x: 1 inside, 0 outside. Of s: as `ste.inside` says, the end of the range outside.
    """
    if torch.is_grad_enabled() and (x.requires_grad or scale.requires_grad):
        return _STEQuantize.apply(x, scale, noise, ste)  # type: ignore[no-any-return]
    return rounded(x / scale, ste, noise).mul_(scale)


def within_range(u: Tensor, ste: STERange) -> Tensor:
    """Where u lies strictly between the ends (LSQ, arXiv 1902.08153, eq. 3)."""
    return (u > ste.qmin) & (u < ste.qmax)


def rounded(u: Tensor, ste: STERange, noise: Tensor | None) -> Tensor:
    """U = x / s clipped and rounded, or with noise, in a new tensor."""
    clipped = u.clamp(ste.qmin, ste.qmax)
    return clipped.round_() if noise is None else torch.where(within_range(u, ste), u + noise, clipped)


class _STEQuantize(torch.autograd.Function):
    """(x, s, noise) -> quantized values."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, noise: Tensor | None, ste: STERange) -> Tensor:
        ctx.ste = ste
        ctx.save_for_backward(x, scale, noise)
        return rounded(x / scale, ste, noise).mul_(scale)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        x, scale, noise = ctx.saved_tensors
        ste: STERange = ctx.ste
        u = x / scale
        within = within_range(u, ste)
        to_x = grads[0] * within if ctx.needs_input_grad[0] else None
        if not ctx.needs_input_grad[1]:
            return to_x, None, None, None
        slope = u.clamp(ste.qmin, ste.qmax)
        if ste.inside == "none":
            slope.masked_fill_(within, 0)
        else:
            slope = torch.where(within, u.round().sub_(u) if noise is None else noise, slope)
        return to_x, (grads[0] * slope).sum_to_size(scale.shape) * ste.factor, None, None

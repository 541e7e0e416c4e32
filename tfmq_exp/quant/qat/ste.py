"""Values on a grid with a trained step, and the gradients of clip value and step written out.

Only `x` is kept for the backward pass; the network keeps it anyway.
"""

from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

Inside = Literal["rounding", "none"]


class STERange(NamedTuple):
    """The ends of the grid, what the step's gradient is multiplied by, and its part from values inside the grid.

    `rounding`: round(x / s) - x / s, or the noise that stands for it; `none`: only what is clipped moves the step.
    """

    low: int
    high: int
    factor: float = 1.0
    inside: Inside = "rounding"


def ste_quantize(
    x: Float[Tensor, "*shape"], scale: Tensor, rule: STERange, noise: Float[Tensor, "*shape"] | None = None
) -> Float[Tensor, "*shape"]:
    """Values s round(clip(x / s)); with noise x + s noise inside the grid, and its ends outside.

    Gradient to x: 1 inside, 0 outside. To s: the rule's inside, the end of the grid outside.
    """
    if torch.is_grad_enabled() and (x.requires_grad or scale.requires_grad):
        return _Stepped.apply(x, scale, noise, rule)  # type: ignore[no-any-return]
    return steps(x / scale, rule, noise).mul_(scale)


def inside(u: Tensor, rule: STERange) -> Tensor:
    """Which values the grid reaches: strictly between its ends (LSQ, arXiv 1902.08153, eq. 3)."""
    return (u > rule.low) & (u < rule.high)


def steps(u: Tensor, rule: STERange, noise: Tensor | None) -> Tensor:
    """Multiples u = x / s rounded, or disturbed, in a new tensor."""
    clipped = u.clamp(rule.low, rule.high)
    return clipped.round_() if noise is None else torch.where(inside(u, rule), u + noise, clipped)


class _Stepped(torch.autograd.Function):
    """(x, s, noise) -> values on the grid."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, noise: Tensor | None, rule: STERange) -> Tensor:
        ctx.rule = rule
        ctx.save_for_backward(x, scale, noise)
        return steps(x / scale, rule, noise).mul_(scale)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        x, scale, noise = ctx.saved_tensors
        rule: STERange = ctx.rule
        u = x / scale
        within = inside(u, rule)
        to_x = grads[0] * within if ctx.needs_input_grad[0] else None
        if not ctx.needs_input_grad[1]:
            return to_x, None, None, None
        slope = u.clamp(rule.low, rule.high)
        if rule.inside == "none":
            slope.masked_fill_(within, 0)
        else:
            slope = torch.where(within, u.round().sub_(u) if noise is None else noise, slope)
        return to_x, (grads[0] * slope).sum_to_size(scale.shape) * rule.factor, None, None

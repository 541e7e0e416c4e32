"""Quantization with a trained scale, with the gradients of clip value and scale written out (straight-through estimators)."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from tfmq_exp.quant.spec import IntRange

# of the histogram of rounding errors that NIPQ's noise follows
BINS = 256  # of the histogram of rounding errors, in the release
MAX_COUNTED = 65536  # errors
QUANTILES = 4096  # at which the inverse of its distribution function is tabulated


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


def error_noise(errors: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Independent values with the distribution of `errors`: that of a histogram over [-1/2, 1/2], uniform in each bin.

    Values outside that interval do not count; uniform where none is inside. Of many values, random ones are counted: a regular
    stride would hit the same column of every image, or the same tap of every kernel. Draws from torch's generator of the device.
    """
    counted = errors.flatten()
    if len(counted) > MAX_COUNTED:
        counted = counted[torch.randint(len(counted), (MAX_COUNTED,), device=counted.device)]
    counts = torch.histc(counted.float(), BINS, -0.5, 0.5)
    values = quantiles(torch.where(counts.sum() > 0, counts, torch.ones_like(counts)))
    # a table look-up: a search for each value takes longer than the rest of a training step
    place = torch.rand(errors.numel(), device=errors.device).mul_(QUANTILES)
    cell = place.int()
    low, high = values[:-1].index_select(0, cell), values[1:].index_select(0, cell)
    return torch.lerp(low, high, place.sub_(cell)).reshape(errors.shape).to(errors.dtype)


def quantiles(counts: Float[Tensor, "bins"]) -> Float[Tensor, "quantiles"]:
    """Values that equal shares of a histogram's mass lie below, from the lowest that has any to the highest."""
    below = torch.nn.functional.pad(counts.double().cumsum(0), (1, 0))
    mass = torch.linspace(0, 1, QUANTILES + 1, dtype=below.dtype, device=below.device) * below[-1]
    bins = torch.searchsorted(below[1:].contiguous(), mass, right=False).clamp_(max=BINS - 1)
    within = ((mass - below[bins]) / counts.double()[bins].clamp(min=1)).clamp(0, 1)
    return ((bins + within) / BINS - 0.5).float()

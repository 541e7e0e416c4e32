"""Noise Injection Pseudo Quantization (NIPQ, arXiv 2206.00820), with fixed bits."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from tfmq_exp.quant.qat.base import Extra, IntRange, IntRangeKind, QATQuantizeFn
from tfmq_exp.quant.qat.lsq import Lsq
from tfmq_exp.quant.qat.ste import ste_quantize, within_range

BINS = 256  # of the histogram of rounding errors, in the release
MAX_COUNTED = 65536  # errors
QUANTILES = 4096  # at which the inverse of its distribution function is tabulated


@dataclass(frozen=True)
class Nipq(QATQuantizeFn):
    """Pseudo-quantization noise with the distribution of the rounding error in training; plain rounding afterwards.

    Inside the range x + s noise, outside its ends; gradients of alpha = s qmax are noise / qmax and the sign. No gradient
    passes through the noise. The network's bits are not learned: with fixed bits the noise on them rounds away.
    """

    int_range: IntRangeKind = "narrow"

    def __call__(self, x: Tensor, scale: Tensor, ints: IntRange, extra: Extra) -> Tensor:
        with torch.no_grad():
            u = x / scale
            noise = error_noise(torch.where(within_range(u, ints), u.round() - u, 1.0))
        return ste_quantize(x, scale, ints, noise)

    def for_inference(self) -> Lsq:
        """Rounding, as the release trains its last epochs."""
        return Lsq(self.int_range)


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

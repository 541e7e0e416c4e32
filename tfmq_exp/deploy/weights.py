"""Weights as an integer engine multiplies them: signed bytes with zero point 0 and a scale per output channel."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int8, Int16, UInt8
from torch import Tensor

from tfmq_exp.quant.layers import QuantizedWeight

BYTE = torch.iinfo(torch.int8)
PAIR_SAFE = 64  # two products of a byte with this stay below 2^15: 2 * 255 * 64 = 32640


class DoesNotFit(ValueError):  # noqa: N818
    """Integers that no integer engine here executes; the message says why."""


@dataclass(frozen=True)
class SignedWeight:
    """w = scale (stored - shift + offset), all but `stored` per output channel.

    Args:
        stored: what goes to the disk, 0 .. 2^bits - 1.
        bits: of `stored`.
        shift: with it, stored - shift is a signed byte.
        scale: in float32.
        offset: zero but for channels of which code minus zero point needs more than eight bits; there the engine adds
            offset times the sum of the inputs, which one more output channel with ones as its weight computes.
    """

    stored: UInt8[Tensor, "out *rest"]
    bits: int
    shift: Int16[Tensor, "out"]
    scale: Float[Tensor, "out"]
    offset: Float[Tensor, "out"]

    @property
    def exact(self) -> bool:
        """Whether signed bytes alone say everything."""
        return not bool(self.offset.any())

    @property
    def signed(self) -> Int8[Tensor, "out *rest"]:
        """What the engine multiplies with."""
        return (self.stored.to(torch.int16) - per_row(self.shift, self.stored.dim())).to(torch.int8)

    @property
    def reach(self) -> int:
        """The largest magnitude that the engine multiplies with."""
        return int(self.signed.to(torch.int16).abs().max())

    @property
    def sums(self) -> Float[Tensor, "out"]:
        """Every channel's sum of weights: how much its output moves when all of its inputs grow by one."""
        return self.over_inputs.flatten(1).sum(1).float()

    @property
    def taps(self) -> Float[Tensor, "out 1 *rest"]:
        """The weight summed over its inputs: what it makes of inputs whose channels are all the same."""
        return self.over_inputs.float()

    @property
    def over_inputs(self) -> Float[Tensor, "out 1 *rest"]:
        """Sums over the inputs in double precision."""
        total = self.signed.sum(1, keepdim=True, dtype=torch.int64).double()
        dims, inputs = self.stored.dim(), self.stored.shape[1]
        return (total + per_row(self.offset.double() * inputs, dims)) * per_row(self.scale.double(), dims)


def per_row(values: Tensor, dims: int) -> Tensor:
    """One value per row, in the shape that broadcasts against a tensor of so many dimensions: rows of weights are output channels."""
    return values.reshape(-1, *(1,) * (dims - 1))


def signed_weight(weight: QuantizedWeight) -> SignedWeight:
    """The same integers in the engine's form.

    Raises:
        DoesNotFit: zero points that are no integers, or scales that are not one per output channel or tensor.
    """
    codes, qparams, spec = weight
    out = len(codes)
    scale, zero_point = (q.detach().cpu().float().flatten() for q in qparams)
    if scale.numel() not in (1, out) or (scale.numel() == out != 1 and qparams.scale.shape[0] != out):
        raise DoesNotFit(f"{scale.numel()} weight scales for {out} output channels; one per channel or one in all fits")
    if not bool((zero_point == zero_point.round()).all()):
        raise DoesNotFit(f"a weight zero point of {zero_point[zero_point != zero_point.round()][0]:g} is no integer")
    scale, zero_point = scale.expand(out).contiguous(), zero_point.expand(out)
    stored = codes.detach().cpu()
    exact = zero_point - spec.qmin  # the shift that leaves nothing over
    flat = stored.flatten(1).float()
    low, high = flat.amin(1) - exact, flat.amax(1) - exact
    fits = (low >= BYTE.min) & (high <= BYTE.max) & (exact >= BYTE.min)
    if spec.bits <= 4:  # the shift is a signed byte of its own there
        fits &= exact <= BYTE.max
    shift = torch.where(fits, exact, torch.full_like(exact, spec.levels // 2))
    return SignedWeight(stored, spec.bits, shift.to(torch.int16), scale, shift - exact)


def halves(signed: Int8[Tensor, "out *rest"]) -> Int8[Tensor, "twice *rest"]:
    """Two weights of at most 64 in magnitude that add up to the given one, the first above the second.

    For processors that add pairs of products in sixteen bits, where those of full bytes saturate.
    """
    low = signed >> 1
    return torch.cat([low, signed - low])

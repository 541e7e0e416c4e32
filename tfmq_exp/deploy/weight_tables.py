"""Weights as integer engines multiply them: signed bytes with zero point 0 and one scale per output channel."""

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Float64, Int8, Int16, UInt8
from torch import Tensor

from tfmq_exp.quant.layers import QuantizedWeight

BYTE = torch.iinfo(torch.int8)
PAIR_SAFE = 64  # two products of a byte with this stay below 2^15: 2 * 255 * 64 = 32640


class NotRepresentableError(ValueError):
    """Quantization parameters that no integer engine executes; the message is the reason."""


@dataclass(frozen=True)
class SignedWeight:
    """w = scale * (stored - shift + offset); all but `stored` per output channel.

    Args:
        stored: codes as they are saved, 0 .. 2^bits - 1.
        bits: of `stored`.
        shift: `stored - shift` is a signed byte.
        scale: in float32.
        offset: 0 unless code minus zero point of the channel exceeds eight bits; the engine then adds offset * sum(x), which
            one more output channel whose weights are all 1 computes.
    """

    stored: UInt8[Tensor, "out *rest"]
    bits: int
    shift: Int16[Tensor, "out"]
    scale: Float[Tensor, "out"]
    offset: Float[Tensor, "out"]

    @property
    def exact(self) -> bool:
        """Whether signed bytes represent the weight without `offset`."""
        return not bool(self.offset.any())

    @property
    def signed(self) -> Int8[Tensor, "out *rest"]:
        """Signed bytes that the engine multiplies with."""
        return (self.stored.to(torch.int16) - per_row(self.shift, self.stored.dim())).to(torch.int8)

    @property
    def taps(self) -> Float64[Tensor, "out 1 *rest"]:
        """The weight summed over its input channels."""
        total, dims = self.signed.sum(1, keepdim=True, dtype=torch.int64).double(), self.stored.dim()
        offset = per_row(self.offset.double() * self.stored.shape[1], dims)
        return (total + offset) * per_row(self.scale.double(), dims)

    @property
    def sums(self) -> Float[Tensor, "out"]:
        """Sum of the weights of every output channel."""
        return self.taps.flatten(1).sum(1).float()

    @property
    def extended(self) -> "SignedWeight":
        """The weight with one more output channel of ones, which sums the inputs, if it has an offset."""
        if self.exact:
            return self
        ones = {"stored": 1, "shift": 0, "scale": 1, "offset": 0}
        added = {name: torch.full_like(getattr(self, name)[:1], one) for name, one in ones.items()}
        return replace(self, **{name: torch.cat([getattr(self, name), one]) for name, one in added.items()})

    def summands(self, pairs_saturate: bool) -> int:
        """Number of weights that it is executed as: 2 (`split_in_two`) where sums of pairs of products would saturate."""
        return 2 if pairs_saturate and int(self.signed.to(torch.int16).abs().max()) > PAIR_SAFE else 1


def per_row(values: Tensor, dims: int) -> Tensor:
    """Reshape one value per row so that it broadcasts against a tensor with `dims` dimensions."""
    return values.reshape(-1, *(1,) * (dims - 1))


def signed_weight(weight: QuantizedWeight) -> SignedWeight:
    """Convert a quantized weight to signed bytes; the integers stay the same.

    Raises:
        NotRepresentableError: zero points that are not integers, or scales that are not one per output channel or tensor.
    """
    codes, qparams, spec = weight
    out = len(codes)
    scale, zero_point = (q.detach().cpu().float().flatten() for q in qparams)
    if scale.numel() not in (1, out) or (scale.numel() == out != 1 and qparams.scale.shape[0] != out):
        raise NotRepresentableError(
            f"{scale.numel()} weight scales for {out} output channels; one each or one in all fits"
        )
    if bool((fraction := zero_point != zero_point.round()).any()):
        raise NotRepresentableError(f"a weight zero point of {zero_point[fraction][0]:g} is no integer")
    scale, zero_point = scale.expand(out).contiguous(), zero_point.expand(out)
    stored, exact = codes.detach().cpu(), zero_point - spec.qmin  # the shift that needs no offset
    low, high = (end - exact for end in stored.flatten(1).float().aminmax(dim=1))
    fits = (low >= BYTE.min) & (high <= BYTE.max) & (exact >= BYTE.min)
    if spec.bits <= 4:  # OpenVINO stores the shift of such weights as a signed byte
        fits &= exact <= BYTE.max
    shift = torch.where(fits, exact, torch.full_like(exact, spec.levels // 2))
    return SignedWeight(stored, spec.bits, shift.to(torch.int16), scale, shift - exact)


def split_in_two(signed: Int8[Tensor, "out *rest"]) -> Int8[Tensor, "twice *rest"]:
    """Two weights with magnitudes of at most 64 whose sum is the given one, the first above the second.

    Processors that add pairs of products in sixteen bits saturate with weights of eight bits.
    """
    low = signed >> 1
    return torch.cat([low, signed - low])

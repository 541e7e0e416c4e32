"""Integer range of a quantizer, and the pair (scale, zero point) that places it on the real line."""

from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

from torch import Tensor

from tfmq_exp.core.validate import check_fields, one_of

Scheme = Literal["affine", "symmetric", "unsigned"]


@dataclass(frozen=True)
class QuantSpec:
    """`2**bits` integers, and the axis along which every index has its own range (None: one range for the tensor).

    affine: 0 .. 2**bits - 1 with a zero point; symmetric: -2**(bits-1) .. 2**(bits-1) - 1, zero point 0;
    unsigned: 0 .. 2**bits - 1, zero point 0, for values that are never negative (softmax).

    Raises:
        ValueError: bits outside 2..16, an unknown scheme, or an axis that is none.
    """

    bits: int
    scheme: Scheme = "affine"
    axis: int | None = None

    def __post_init__(self) -> None:
        if type(self.bits) is not int or not 2 <= self.bits <= 16:
            raise ValueError(f"bits must be an integer from 2 to 16, got {self.bits!r}")
        check_fields(self, scheme=one_of(*get_args(Scheme)))
        if self.axis is not None and (type(self.axis) is not int or self.axis < 0):
            raise ValueError(f"axis must be the number of a dimension or null, got {self.axis!r}")

    @property
    def levels(self) -> int:
        """Number of integers."""
        return 2**self.bits

    @property
    def qmin(self) -> int:
        return -(self.levels // 2) if self.scheme == "symmetric" else 0

    @property
    def qmax(self) -> int:
        return self.qmin + self.levels - 1

    def range_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of lo, hi, scale and zero point for a tensor of `shape`: 1 everywhere but along `axis`."""
        return tuple(size if dim == self.axis else 1 for dim, size in enumerate(shape))


class QParams(NamedTuple):
    """Scale (positive) and integer-valued zero point; both broadcast against the tensor that they quantize."""

    scale: Tensor
    zero_point: Tensor

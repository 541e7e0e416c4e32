"""Integer range of a quantizer, and the pair (scale, zero point) that places it on the real line."""

from dataclasses import dataclass
from typing import Literal, NamedTuple

from torch import Tensor

from tfmq_exp.core.validate import Checked

Scheme = Literal["affine", "symmetric", "unsigned"]
IntRangeKind = Literal["full", "narrow", "tdq_release"]


@dataclass(frozen=True)
class QuantSpec(Checked):
    """`2**bits` integers, and the axis along which every index has its own range (None: one range for the tensor).

    affine: 0 .. 2**bits - 1 with a zero point; symmetric: -2**(bits-1) .. 2**(bits-1) - 1, zero point 0;
    unsigned: 0 .. 2**bits - 1, zero point 0, for values that are never negative (softmax). Bits are 2 .. 16.
    """

    bits: int
    scheme: Scheme = "affine"
    axis: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if type(self.bits) is not int or not 2 <= self.bits <= 16:
            raise ValueError(f"bits must be an integer from 2 to 16, got {self.bits!r}")
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


class IntRange(NamedTuple):
    """Smallest and largest used integer of a QAT quantizer, and how many values share one scale."""

    qmin: int
    qmax: int
    num_values: int = 1


def int_range(spec: QuantSpec, kind: IntRangeKind) -> IntRange:
    """Integers that a QAT quantizer uses; ValueError for a spec with a zero point, or without an integer above zero.

    full: all of the spec's; narrow: as many below zero as above; tdq_release: +-(2^(b-1) - 2), so 2^b - 3 codes (b = 4: -6..6);
    unsigned 0..2^b - 2 (0..14), as in TDQ's code.
    """
    if spec.scheme == "affine":
        raise ValueError("a trained range needs a symmetric or unsigned spec, got affine")
    qmax = spec.qmax - (kind == "tdq_release")
    if qmax < 1:
        raise ValueError(f"{spec.bits} bits with the integer range {kind} leave no integer above zero")
    if spec.scheme == "unsigned":
        return IntRange(0, qmax)
    return IntRange(spec.qmin if kind == "full" else -qmax, qmax)


def range_ratio(spec: QuantSpec, kind: IntRangeKind) -> float:
    """qmax(full) / qmax(used): multiply a range by it so that its maximum falls on the largest used code."""
    return 1.0 if kind == "full" else spec.qmax / int_range(spec, kind).qmax

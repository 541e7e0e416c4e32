"""Quantizer functions of quantization-aware training (QAT): the arithmetic, as frozen dataclasses.

A function takes x, a scale, the integer range, and a few parameters of its own. The range parameters of the papers are
multiples of the scale, so that a scale generated from the timestep (TDQ) fits every function.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

from torch import Tensor

from tfmq_exp.core.validate import AMOUNT, check_fields, one_of
from tfmq_exp.quant.spec import QuantSpec

IntRangeKind = Literal["full", "narrow", "tdq_release"]
Extra = Mapping[str, Tensor]  # values of a function's own parameters, scalars


class IntRange(NamedTuple):
    """Smallest and largest used integer, and how many values share one scale."""

    qmin: int
    qmax: int
    num_values: int = 1


class ExtraParam(NamedTuple):
    """Initial value of a parameter that is trained with the scale, and the interval that it is clamped to."""

    init: float
    min: float
    max: float


def int_range(spec: QuantSpec, kind: IntRangeKind) -> IntRange:
    """Integers that are used.

    full: all of the spec's; narrow: as many below zero as above; tdq_release: +-(2^(b-1) - 2), so 2^b - 3 codes (b = 4: -6..6);
    unsigned 0..2^b - 2 (0..14), as in TDQ's code.

    Raises:
        ValueError: a spec with a zero point, or one that has no integer above zero left.
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
    return spec.qmax / int_range(spec, kind).qmax


@dataclass(frozen=True)
class QATQuantizeFn:
    """s * round(clip(x / s)), unless a subclass says otherwise.

    Args:
        int_range: see the function `int_range`.
        decay: weight of the L2 penalty on the clip value s * qmax.
    """

    int_range: IntRangeKind = "full"
    decay: float = 0.0

    def __post_init__(self) -> None:
        check_fields(self, int_range=one_of(*get_args(IntRangeKind)), decay=AMOUNT)

    def extra_params(self) -> Mapping[str, ExtraParam]:
        """Parameters that are trained with the scale, by name."""
        return {}

    def codes(self, x: Tensor, scale: Tensor, ints: IntRange, extra: Extra) -> Tensor:
        """Integer codes of `x` (as floats), without a gradient. The arguments are those of `__call__`."""
        return (x / scale).clamp_(ints.qmin, ints.qmax).round_()

    def output_scale(self, scale: Tensor, extra: Extra) -> Tensor:
        """Real value of one code."""
        return scale

    def __call__(self, x: Tensor, scale: Tensor, ints: IntRange, extra: Extra) -> Tensor:
        """Simulated quantization with the gradients of training.

        Args:
            x: of any shape.
            scale: broadcasts against `x`.
            ints: the integer range.
            extra: present values of `extra_params`.
        """
        raise NotImplementedError

    def for_inference(self) -> "QATQuantizeFn":
        """The function after training: the same values without noise and penalty."""
        raise NotImplementedError

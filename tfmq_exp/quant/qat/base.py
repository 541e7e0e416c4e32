"""What a form is: the arithmetic of a quantizer whose range is trained, as a record of choices.

A form knows x, the step s of a source, the grid, and a few numbers of its own; it knows nothing of where s comes from. The
range parameters of the papers are multiples of s, so that a step generated from the timestep (TDQ) fits every form.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

from jaxtyping import Float
from torch import Tensor

from tfmq_exp.core.validate import AMOUNT, check_fields
from tfmq_exp.quant.spec import QuantSpec

IntRangeKind = Literal["full", "narrow", "official"]


class IntRange(NamedTuple):
    """The integers that a form uses, both ends included, and how many values share one step."""

    low: int
    high: int
    values: int = 1


class ExtraParam(NamedTuple):
    """A number of the form's own: where it starts, and the interval that it is kept in."""

    start: float
    low: float
    high: float


def int_range(spec: QuantSpec, levels: IntRangeKind) -> tuple[int, int]:
    """The smallest and the largest integer.

    full: all of the grid; narrow: as many below zero as above; official: one fewer at the ends than narrow on a symmetric grid,
    one fewer at the top on an unsigned one, which is what TDQ's release leaves of 2^b - 1 levels.

    Raises:
        ValueError: a grid with a zero point, or one of which nothing is left.
    """
    if spec.scheme == "affine":
        raise ValueError("a trained range needs a symmetric or unsigned grid, got affine")
    left_out = 1 if levels == "official" else 0
    high = spec.qmax - left_out
    if high < 1:
        raise ValueError(f"{spec.bits} bits with {levels} levels leave no integer above zero")
    if spec.scheme == "unsigned":
        return 0, high
    return (spec.qmin if levels == "full" else -high), high


def range_ratio(spec: QuantSpec, levels: IntRangeKind) -> float:
    """What a range is multiplied by for its end to stand on the largest integer that is used, where a step is the range over the grid's."""
    return spec.qmax / int_range(spec, levels)[1]


@dataclass(frozen=True)
class QATQuantizeFn:
    """x on a grid of step s: s * round(clip(x / s)), unless a subclass says otherwise.

    Args:
        levels: see `int_range`.
        decay: weight of the L2 penalty on the clip value s * high.
    """

    levels: IntRangeKind = "full"
    decay: float = 0.0

    def __post_init__(self) -> None:
        if self.levels not in get_args(IntRangeKind):
            raise ValueError(f"levels must be one of {', '.join(get_args(IntRangeKind))}, got {self.levels!r}")
        check_fields(self, decay=AMOUNT)

    def further(self) -> Mapping[str, ExtraParam]:
        """Numbers that are trained beside the step, by name."""
        return {}

    def codes(
        self, x: Float[Tensor, "*shape"], scale: Tensor, grid: IntRange, further: Mapping[str, Tensor]
    ) -> Float[Tensor, "*shape"]:
        """Integer codes of `x` (as floats), without a gradient."""
        return (x / scale).clamp_(grid.low, grid.high).round_()

    def output_scale(self, scale: Tensor, further: Mapping[str, Tensor]) -> Tensor:
        """What one code stands for."""
        return scale

    def __call__(
        self, x: Float[Tensor, "*shape"], scale: Tensor, grid: IntRange, further: Mapping[str, Tensor]
    ) -> Float[Tensor, "*shape"]:
        """Simulated quantization, with the gradients that the form trains with.

        `scale` broadcasts against `x`; `further` holds scalars.
        """
        raise NotImplementedError

    def for_inference(self) -> "QATQuantizeFn":
        """What is left of it once training is over: the same values, no noise, no penalty."""
        raise NotImplementedError

"""Quantizers of quantization-aware training: a form on top of a source of steps, and a form with a weight's own steps."""

from collections.abc import Iterator
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from tfmq_exp.core.finite import require_finite
from tfmq_exp.quant.functional import SMALLEST_SCALE
from tfmq_exp.quant.observers import Observer
from tfmq_exp.quant.qat.base import IntRange, QATQuantizeFn, int_range
from tfmq_exp.quant.quantizers.affine import AffineQuantizer, WeightQuantizer
from tfmq_exp.quant.rounding import AdaRound
from tfmq_exp.quant.scales.base import Source
from tfmq_exp.quant.spec import QParams, QuantSpec

SILU_MINIMUM = -0.2785  # as TDQ's release has it; -0.27846454...

Centre = Literal["zero", "silu", "learned"]


def checked_centre(centre: str) -> None:
    """Raise ValueError for a place that a grid cannot be centred on."""
    if centre not in ("zero", "silu", "learned"):
        raise ValueError(f"the centre of a grid must be zero, silu or learned, got {centre!r}")


def numbers(form: QATQuantizeFn) -> nn.ParameterDict:
    """What a form trains beside the step."""
    made = {name: nn.Parameter(torch.tensor(f.start), requires_grad=False) for name, f in form.further().items()}
    return nn.ParameterDict(made)


@torch.no_grad()
def keep_inside(further: nn.ParameterDict, form: QATQuantizeFn) -> None:
    """Move the numbers of a form back to their intervals."""
    for name, bounds in form.further().items():
        further[name].clamp_(bounds.low, bounds.high)


class TrainableQuantizer(AffineQuantizer):
    """Quantizes activations by a form. Noise, where the form has any, acts in training mode alone.

    Args:
        source: of the steps; its grid must have no zero point.
        form: the arithmetic.
        centre: what is subtracted before and added after: nothing; the minimum of SiLU, for an unsigned grid on its outputs;
            or a number that starts at the mean of the first batch and is trained. NaN until then.
    """

    offset: nn.Parameter | None

    def __init__(self, source: Source, form: QATQuantizeFn, centre: Centre = "zero") -> None:
        super().__init__(source)
        checked_centre(centre)
        self.form, self.low, self.high = form, *int_range(source.spec, form.levels)
        self.further = numbers(form)
        start = {"zero": None, "silu": SILU_MINIMUM, "learned": torch.nan}[centre]
        self.offset = None if start is None else nn.Parameter(torch.tensor(start), requires_grad=False)
        self.centre = centre

    def centred(self, x: Float[Tensor, "batch *rest"]) -> Float[Tensor, "batch *rest"]:
        """What the grid sees."""
        return x if self.offset is None else x - self.offset

    @torch.no_grad()
    def observe(self, x: Float[Tensor, "batch *rest"]) -> None:
        """Show the centred `x` to the source."""
        if self.offset is not None and bool(self.offset.isnan()):
            self.offset.copy_(x.mean())
        self.source.observe(self.centred(x.detach()))

    def quantize(self, x: Float[Tensor, "batch *rest"]) -> Float[Tensor, "batch *rest"]:
        """Real numbers on the grid, or what the form trains with in their place."""
        seen = self.centred(x)
        form = self.form if self.training else self.form.for_inference()
        grid = IntRange(self.low, self.high, x[0].numel())
        out = form(seen, self.source(seen).scale, grid, dict(self.further))
        return out if self.offset is None else out + self.offset

    def trainable(self) -> Iterator[nn.Parameter]:
        """The form's own numbers, and the centre where it is trained; steps are the source's."""
        yield from self.further.values()
        if self.offset is not None and self.centre == "learned":
            yield self.offset

    def clamp_parameters(self) -> None:
        """Called after every step of an optimiser."""
        self.source.clamp_parameters()
        keep_inside(self.further, self.form)

    def merge(self) -> None:
        """Tables in place of networks, and no noise."""
        super().merge()
        self.form = self.form.for_inference()


class TrainableWeightQuantizer(WeightQuantizer):
    """Puts a real-valued weight on its grid in every forward pass; its steps are trained with it.

    Args:
        weight, spec: the weight and its grid, which must have no zero point.
        estimator: of the range at the start.
        form: the arithmetic.
    """

    def __init__(
        self, weight: Float[Tensor, "out *rest"], spec: QuantSpec, estimator: Observer, form: QATQuantizeFn
    ) -> None:
        super().__init__(weight, spec, estimator)
        steps = nn.Parameter(self.scale, requires_grad=False)
        del self.scale
        self.scale = steps
        self.form, self.low, self.high = form, *int_range(spec, form.levels)
        self.values = weight.numel() // self.scale.numel()
        self.further = numbers(form)

    @torch.no_grad()
    def observe(self, x: Float[Tensor, "out *rest"]) -> None:
        """The step that takes the estimator's range to the largest code."""
        lo, hi = self.estimator(x.detach(), self.spec)
        reach = require_finite(torch.maximum(lo.abs(), hi.abs()), f"a range of {type(self.estimator).__name__}")
        self.scale.copy_((reach / self.high).clamp(min=SMALLEST_SCALE))

    @property
    def qparams(self) -> QParams:
        """What a code stands for."""
        return QParams(self.form.output_scale(self.scale, dict(self.further)).detach(), self.zero_point)

    @property
    def grid(self) -> IntRange:
        """Its integers, and how many values share a step."""
        return IntRange(self.low, self.high, self.values)

    def learn_rounding(self, weight: Float[Tensor, "out *rest"]) -> AdaRound:
        """Refused: a weight that is trained takes its rounding with it."""
        raise TypeError(
            f"a weight of the form {type(self.form).__name__} is trained, its rounding is not learned apart"
        )

    @torch.no_grad()
    def codes(self, weight: Float[Tensor, "out *rest"]) -> Float[Tensor, "out *rest"]:
        """Integer codes of the weight."""
        return self.form.for_inference().codes(weight, self.scale, self.grid, dict(self.further))

    def quantize(self, x: Float[Tensor, "out *rest"]) -> Float[Tensor, "out *rest"]:
        """The weight on its grid, or what the form trains with in its place."""
        form = self.form if self.training else self.form.for_inference()
        return form(x, self.scale, self.grid, dict(self.further))

    def trainable(self) -> Iterator[nn.Parameter]:
        """Steps, and the form's own numbers."""
        yield self.get_parameter("scale")
        yield from self.further.values()

    @torch.no_grad()
    def clamp_parameters(self) -> None:
        """Called after every step of an optimiser."""
        self.scale.clamp_(min=SMALLEST_SCALE)
        keep_inside(self.further, self.form)

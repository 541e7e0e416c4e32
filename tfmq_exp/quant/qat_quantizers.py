"""Quantizers of quantization-aware training, of activations and of weights."""

from collections.abc import Iterator
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn

from tfmq_exp.core.finite import require_finite
from tfmq_exp.quant.functional import SMALLEST_SCALE
from tfmq_exp.quant.observers import Observer
from tfmq_exp.quant.qat_functions import QATQuantizeFn
from tfmq_exp.quant.quantizers import AffineQuantizer, Quantizer, WeightQuantizer
from tfmq_exp.quant.rounding import AdaRound
from tfmq_exp.quant.scales.base import ScaleProvider
from tfmq_exp.quant.spec import QParams, QuantSpec, int_range

SILU_MINIMUM = -0.2785  # as TDQ's release has it; -0.27846454...

Offset = Literal["zero", "silu", "learned"]


class QATQuantizer(Quantizer):
    """Base of both quantizers: the function `fn`, its integer range `ints` and its own parameters `extra`."""

    def set_fn(self, fn: QATQuantizeFn, spec: QuantSpec, num_values: int = 1) -> None:
        self.fn, self.ints = fn, int_range(spec, fn.int_range)._replace(num_values=num_values)
        made = {name: nn.Parameter(torch.tensor(p.init), requires_grad=False) for name, p in fn.extra_params().items()}
        self.extra = nn.ParameterDict(made)

    @property
    def acting_fn(self) -> QATQuantizeFn:
        """The function; in evaluation mode without noise."""
        return self.fn if self.training else self.fn.for_inference()

    def trainable(self) -> Iterator[nn.Parameter]:
        """The function's own parameters, and those of the quantizer; scales of activations are the provider's."""
        yield from self.extra.values()

    @torch.no_grad()
    def clamp_parameters(self) -> None:
        """Called after every step of an optimiser."""
        for name, bounds in self.fn.extra_params().items():
            self.extra[name].clamp_(bounds.min, bounds.max)


class TrainableQuantizer(AffineQuantizer, QATQuantizer):
    """Quantizes activations by a QAT function. Noise, where the function has any, acts in training mode alone.

    `offset` is subtracted before and added after: `zero`; `silu`, the minimum of SiLU, for an unsigned range on its outputs; or
    `learned`, a number that starts at the mean of the first batch (NaN until then) and is trained. The spec has no zero point.
    """

    offset: nn.Parameter | None

    def __init__(self, scale_provider: ScaleProvider, fn: QATQuantizeFn, offset: Offset = "zero") -> None:
        super().__init__(scale_provider)
        if offset not in get_args(Offset):
            raise ValueError(f"the offset must be zero, silu or learned, got {offset!r}")
        self.set_fn(fn, scale_provider.spec)
        start = {"zero": None, "silu": SILU_MINIMUM, "learned": torch.nan}[offset]
        self.offset = None if start is None else nn.Parameter(torch.tensor(start), requires_grad=False)
        self.learns_offset = offset == "learned"

    @torch.no_grad()
    def observe(self, x: Float[Tensor, "batch *rest"]) -> None:
        if self.offset is not None and bool(self.offset.isnan()):
            self.offset.copy_(x.mean())
        self.scale_provider.observe(x if self.offset is None else x - self.offset)

    def quantize(self, x: Float[Tensor, "batch *rest"]) -> Float[Tensor, "batch *rest"]:
        shifted = x if self.offset is None else x - self.offset
        ints = self.ints._replace(num_values=x[0].numel())
        out = self.acting_fn(shifted, self.scale_provider(shifted).scale, ints, dict(self.extra))
        return out if self.offset is None else out + self.offset

    def trainable(self) -> Iterator[nn.Parameter]:
        yield from super().trainable()
        if self.offset is not None and self.learns_offset:
            yield self.offset

    def clamp_parameters(self) -> None:
        self.scale_provider.clamp_parameters()
        super().clamp_parameters()

    def tabulate(self) -> None:
        super().tabulate()
        self.fn = self.fn.for_inference()


class TrainableWeightQuantizer(WeightQuantizer, QATQuantizer):
    """Quantizes a real-valued weight in every forward pass by a QAT function; its scale, without zero point, is trained too."""

    def __init__(
        self, weight: Float[Tensor, "out *rest"], spec: QuantSpec, observer: Observer, fn: QATQuantizeFn
    ) -> None:
        super().__init__(weight, spec, observer)
        self.set_fn(fn, spec, weight.numel() // self.scale.numel())

    @torch.no_grad()
    def observe(self, x: Float[Tensor, "out *rest"]) -> None:
        """Scale = max / qmax."""
        lo, hi = self.observer(x.detach(), self.spec)
        reach = require_finite(torch.maximum(lo.abs(), hi.abs()), f"a range of {type(self.observer).__name__}")
        self.scale.copy_((reach / self.ints.qmax).clamp(min=SMALLEST_SCALE))

    @property
    def qparams(self) -> QParams:
        return QParams(self.fn.output_scale(self.scale, dict(self.extra)).detach(), self.zero_point)

    def learn_rounding(self, weight: Float[Tensor, "out *rest"]) -> AdaRound:
        raise TypeError(f"a weight of {type(self.fn).__name__} is trained: its rounding cannot be learned separately")

    @torch.no_grad()
    def codes(self, weight: Float[Tensor, "out *rest"]) -> Float[Tensor, "out *rest"]:
        return self.fn.for_inference().codes(weight, self.scale, self.ints, dict(self.extra))

    def quantize(self, x: Float[Tensor, "out *rest"]) -> Float[Tensor, "out *rest"]:
        return self.acting_fn(x, self.scale, self.ints, dict(self.extra))

    def trainable(self) -> Iterator[nn.Parameter]:
        yield self.scale
        yield from super().trainable()

    @torch.no_grad()
    def clamp_parameters(self) -> None:
        self.scale.clamp_(min=SMALLEST_SCALE)
        super().clamp_parameters()

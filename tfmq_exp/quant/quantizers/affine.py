"""Uniform quantizers for activations and for weights."""

import torch
from jaxtyping import Float
from torch import Tensor

from tfmq_exp.core.finite import require_finite
from tfmq_exp.quant.functional import dequantize, fake_quantize, qparams_from_range, quantize, round_ste
from tfmq_exp.quant.observers import Observer
from tfmq_exp.quant.quantizers.base import Quantizer
from tfmq_exp.quant.rounding import AdaRound
from tfmq_exp.quant.scales.base import Source
from tfmq_exp.quant.spec import QParams, QuantSpec


class AffineQuantizer(Quantizer):
    """Quantizes activations with whatever (scale, zero point) its source gives."""

    def __init__(self, source: Source) -> None:
        super().__init__()
        self.source = source

    @property
    def spec(self) -> QuantSpec:
        """The grid."""
        return self.source.spec

    def observe(self, x: Float[Tensor, "batch *rest"]) -> None:
        """Show `x` to the source."""
        self.source.observe(x.detach())

    def quantize(self, x: Float[Tensor, "batch *rest"]) -> Float[Tensor, "batch *rest"]:
        """Simulated quantization: real numbers on the grid."""
        return fake_quantize(x, self.source(x), self.spec)

    def merge(self) -> None:
        """What can be computed before sampling is: a generated interval becomes a table."""
        self.source = self.source.merged()


class WeightQuantizer(Quantizer):
    """Quantizes one weight, whose range is set from the weight itself and whose rounding may be learned."""

    scale: Tensor
    zero_point: Tensor

    def __init__(self, weight: Float[Tensor, "out *rest"], spec: QuantSpec, estimator: Observer) -> None:
        super().__init__()
        self.spec, self.estimator = spec, estimator
        shape = spec.range_shape(weight.shape)
        self.register_buffer("scale", torch.ones(shape, dtype=weight.dtype, device=weight.device))
        self.register_buffer("zero_point", torch.zeros(shape, dtype=weight.dtype, device=weight.device))
        self.rounding: AdaRound | None = None

    def observe(self, x: Float[Tensor, "out *rest"]) -> None:
        """Place the grid on this weight.

        Raises:
            ValueError: the estimator found ends of another shape than the grid has, or such that are not finite.
        """
        lo, hi = self.estimator(x.detach(), self.spec)
        if not lo.shape == hi.shape == self.scale.shape:
            raise ValueError(
                f"the range estimator {type(self.estimator).__name__} must give two ends of shape "
                f"{tuple(self.scale.shape)} for a weight of shape {tuple(x.shape)}, "
                f"got {tuple(lo.shape)} and {tuple(hi.shape)}"
            )
        require_finite(torch.stack([lo, hi]), f"a range of {type(self.estimator).__name__}")
        scale, zero_point = qparams_from_range(lo, hi, self.spec)
        self.scale.copy_(scale)
        self.zero_point.copy_(zero_point)

    @property
    def qparams(self) -> QParams:
        """The grid's scale and zero point."""
        return QParams(self.scale, self.zero_point)

    def learn_rounding(self, weight: Float[Tensor, "out *rest"]) -> AdaRound:
        """Start AdaRound on this weight."""
        self.rounding = AdaRound(weight, self.qparams, self.spec)
        return self.rounding

    def codes(self, weight: Float[Tensor, "out *rest"]) -> Float[Tensor, "out *rest"]:
        """Integer codes of the weight under the current rounding."""
        return quantize(weight, self.qparams, self.spec, self.rounding or round_ste)

    def quantize(self, x: Float[Tensor, "out *rest"]) -> Float[Tensor, "out *rest"]:
        """The weight on its grid, or between two points of it while AdaRound is being learned."""
        if self.rounding is not None and self.rounding.soft:
            return self.rounding.weight()
        return dequantize(self.codes(x), self.qparams)

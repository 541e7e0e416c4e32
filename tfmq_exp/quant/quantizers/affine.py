"""Uniform quantizers of activations and of weights."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from tfmq_exp.core.finite import require_finite
from tfmq_exp.quant.functional import dequantize, fake_quantize, qparams_from_range, quantize, round_ste
from tfmq_exp.quant.observers import Observer
from tfmq_exp.quant.quantizers.base import Quantizer
from tfmq_exp.quant.rounding import AdaRound
from tfmq_exp.quant.scales.base import ScaleProvider
from tfmq_exp.quant.spec import QParams, QuantSpec


class AffineQuantizer(Quantizer):
    """Quantizes activations with the scale and zero point that its provider (`scale_provider`) gives."""

    def __init__(self, scale_provider: ScaleProvider) -> None:
        super().__init__()
        self.scale_provider = scale_provider

    @property
    def spec(self) -> QuantSpec:
        return self.scale_provider.spec

    def observe(self, x: Float[Tensor, "batch *rest"]) -> None:
        self.scale_provider.observe(x.detach())

    def quantize(self, x: Float[Tensor, "batch *rest"]) -> Float[Tensor, "batch *rest"]:
        return fake_quantize(x, self.scale_provider(x), self.spec)

    def tabulate(self) -> None:
        """Prepare for sampling: generated scales become a table."""
        self.scale_provider = self.scale_provider.tabulated()


class WeightQuantizer(Quantizer):
    """Quantizes one weight, whose range is set from the weight itself and whose rounding may be learned.

    Args:
        weight: gives shape, type and device.
        spec: of the integers.
        observer: of the weight's range.
    """

    scale: nn.Parameter
    zero_point: Tensor

    def __init__(self, weight: Float[Tensor, "out *rest"], spec: QuantSpec, observer: Observer) -> None:
        super().__init__()
        self.spec, self.observer = spec, observer
        one = weight.detach().new_ones(spec.range_shape(weight.shape))
        self.scale = nn.Parameter(one, requires_grad=False)
        self.register_buffer("zero_point", torch.zeros_like(one))
        self.rounding: AdaRound | None = None

    def observe(self, x: Float[Tensor, "out *rest"]) -> None:
        """Set scale and zero point from this weight.

        Raises:
            ValueError: the observer's lo and hi have another shape than the scale, or are not finite.
        """
        lo, hi = self.observer(x.detach(), self.spec)
        name = type(self.observer).__name__
        if not lo.shape == hi.shape == self.scale.shape:
            raise ValueError(
                f"the observer {name} must give two ends of shape {tuple(self.scale.shape)} for a weight of shape "
                f"{tuple(x.shape)}, got {tuple(lo.shape)} and {tuple(hi.shape)}"
            )
        require_finite(torch.stack([lo, hi]), f"a range of {name}")
        scale, zero_point = qparams_from_range(lo, hi, self.spec)
        self.scale.copy_(scale)
        self.zero_point.copy_(zero_point)

    @property
    def qparams(self) -> QParams:
        return QParams(self.scale, self.zero_point)

    def learn_rounding(self, weight: Float[Tensor, "out *rest"]) -> AdaRound:
        """Start AdaRound on this weight."""
        self.rounding = AdaRound(weight, self.qparams, self.spec)
        return self.rounding

    def codes(self, weight: Float[Tensor, "out *rest"]) -> Float[Tensor, "out *rest"]:
        """Integer codes of the weight under the current rounding, as floats."""
        return quantize(weight, self.qparams, self.spec, self.rounding or round_ste)

    def quantize(self, x: Float[Tensor, "out *rest"]) -> Float[Tensor, "out *rest"]:
        """Simulated quantization; while AdaRound is being learned, its soft weight."""
        if self.rounding is not None and self.rounding.soft:
            return self.rounding.weight()
        return dequantize(self.codes(x), self.qparams)

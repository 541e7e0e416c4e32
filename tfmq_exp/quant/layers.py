"""Quantized layers: torch's layers with quantizers on the input, the weight and the output.

They inherit from the float layers, so names and parameters of the network stay what they were.
"""

from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple, Self

import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from tfmq_exp.quant.functional import dequantize
from tfmq_exp.quant.quantizers import SplitQuantizer, WeightQuantizer
from tfmq_exp.quant.spec import QParams, QuantSpec


class QuantizedWeight(NamedTuple):
    """A weight as integers: `codes` counts from the spec's smallest integer, so it is never negative."""

    codes: UInt8[Tensor, "out *rest"]
    qparams: QParams
    spec: QuantSpec

    def dequantize(self) -> Float[Tensor, "out *rest"]:
        """Real values of the codes."""
        return dequantize(self.codes.to(self.qparams.scale.dtype) + self.spec.qmin, self.qparams)


def real_weight(parts: Sequence[QuantizedWeight]) -> Float[Tensor, "out *rest"]:
    """Real values of a weight whose parts have quantizers of their own, along its inputs."""
    return parts[0].dequantize() if len(parts) == 1 else torch.cat([part.dequantize() for part in parts], dim=1)


class Integers(nn.Module):
    """A `QuantizedWeight` as buffers, which follow their layer to a device, into copies and into the state dict."""

    codes: Tensor
    scale: Tensor
    zero_point: Tensor

    def __init__(self, weight: QuantizedWeight) -> None:
        super().__init__()
        self.spec = weight.spec
        for name, value in {"codes": weight.codes, **weight.qparams._asdict()}.items():
            self.register_buffer(name, value.detach())

    def weight(self) -> QuantizedWeight:
        return QuantizedWeight(self.codes, QParams(self.scale, self.zero_point), self.spec)


class QuantLayer(nn.Module):
    """Base of quantized layers. An absent quantizer is an `nn.Identity`; a frozen weight has its codes in `integers`."""

    arguments: ClassVar[tuple[str, ...]]  # of the float layer's constructor
    weight: nn.Parameter
    bias: nn.Parameter | None
    input_quantizer: nn.Module
    weight_quantizer: WeightQuantizer | SplitQuantizer[WeightQuantizer] | nn.Identity
    output_quantizer: nn.Module
    integers: nn.ModuleList

    @classmethod
    def from_float(cls, layer: Any) -> Self:
        """Create a quantized layer that shares weight and bias with `layer` (no copy), without quantizers."""
        own = cls(**{name: getattr(layer, name) for name in cls.arguments}, bias=layer.bias is not None, device="meta")
        own.weight, own.bias = layer.weight, layer.bias
        own.input_quantizer, own.weight_quantizer, own.output_quantizer = (nn.Identity() for _ in range(3))
        own.integers = nn.ModuleList()
        return own.train(layer.training)

    def weight_parts(self) -> list[tuple[WeightQuantizer, Float[Tensor, "out *rest"]]]:
        """The weight's quantizers, each with the slice of the weight (along its inputs) that it quantizes."""
        quantizer = self.weight_quantizer
        if isinstance(quantizer, SplitQuantizer):
            return quantizer.pieces(self.weight)
        return [(quantizer, self.weight)] if isinstance(quantizer, WeightQuantizer) else []

    def quantized_weight(self) -> tuple[QuantizedWeight, ...]:
        """The weight as integers: those of a frozen layer, else by each of its quantizers under the present rounding."""
        if self.integers:
            return tuple(part.weight() for part in self.integers)  # type: ignore[operator]
        parts = self.weight_parts()
        if not parts:
            raise TypeError("this layer's weight is not quantized")
        return tuple(
            QuantizedWeight((q.codes(part).detach() - q.spec.qmin).to(torch.uint8), q.qparams, q.spec)
            for q, part in parts
        )

    def freeze_weight(self, parts: tuple[QuantizedWeight, ...]) -> None:
        """Replace the weight by the real values of these integers, and drop its quantizer: nothing is left to round.

        Codes on the meta device have no values: the weight stays as it is.
        """
        if not parts[0].codes.is_meta:
            self.weight = nn.Parameter(real_weight(parts).to(self.weight), requires_grad=False)
        self.weight_quantizer = nn.Identity()
        self.integers = nn.ModuleList(Integers(part) for part in parts).train(self.training)


class QuantLinear(QuantLayer, nn.Linear):  # pyright: ignore[reportIncompatibleVariableOverride]
    """y = Q(Q(x) Q(W)^T + b)."""

    arguments = ("in_features", "out_features")

    def forward(self, input: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch out"]:
        return self.output_quantizer(
            F.linear(self.input_quantizer(input), self.weight_quantizer(self.weight), self.bias)
        )


class QuantConv(QuantLayer):
    """y = Q(Q(W) * Q(x) + b), for torch's convolutions of any dimension."""

    arguments = (
        *("in_channels", "out_channels", "kernel_size", "stride"),
        *("padding", "dilation", "groups", "padding_mode"),
    )

    def forward(self, input: Float[Tensor, "batch in *size"]) -> Float[Tensor, "batch out *size2"]:
        quantized = self.input_quantizer(input), self.weight_quantizer(self.weight)
        return self.output_quantizer(self._conv_forward(*quantized, self.bias))  # type: ignore[operator]


class QuantConv2d(QuantConv, nn.Conv2d):  # pyright: ignore[reportIncompatibleVariableOverride]
    """A convolution of images, [batch, channels, height, width]."""


class QuantConv3d(QuantConv, nn.Conv3d):  # pyright: ignore[reportIncompatibleVariableOverride]
    """A convolution of videos, [batch, channels, frames, height, width]."""


QUANT_LAYERS: dict[type[nn.Module], type[QuantLayer]] = {
    nn.Linear: QuantLinear,
    nn.Conv2d: QuantConv2d,
    nn.Conv3d: QuantConv3d,
}

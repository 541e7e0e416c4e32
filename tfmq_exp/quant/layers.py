"""Twins of torch's layers with quantizers on the input, the weight and the output.

They inherit from the float layers, so names, parameters and state-dict keys of the network stay what they were.
"""

from typing import NamedTuple, Self

import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from tfmq_exp.quant.functional import dequantize
from tfmq_exp.quant.quantizers.affine import WeightQuantizer
from tfmq_exp.quant.quantizers.split import SplitQuantizer
from tfmq_exp.quant.spec import QParams, QuantSpec


class QuantizedWeight(NamedTuple):
    """A weight as integers: `codes` counts from the grid's smallest integer, so it is never negative."""

    codes: UInt8[Tensor, "out *rest"]
    qparams: QParams
    spec: QuantSpec

    def dequantize(self) -> Float[Tensor, "out *rest"]:
        """The real numbers that the integers stand for."""
        return dequantize(self.codes.to(self.qparams.scale.dtype) + self.spec.qmin, self.qparams)


class QuantLayer(nn.Module):
    """What the twins share. An absent quantizer is an `nn.Identity`."""

    weight: nn.Parameter
    input_quantizer: nn.Module
    weight_quantizer: WeightQuantizer | SplitQuantizer[WeightQuantizer] | nn.Identity
    output_quantizer: nn.Module

    @classmethod
    def from_float(cls, layer: nn.Module) -> Self:
        """Turn a float layer into its twin, in place of copying: weight and bias are shared, quantizers absent."""
        twin = cls.__new__(cls)
        # registries of its own: replacing the twin's weight, children or hooks must not reach the float layer
        twin.__dict__.update({k: v.copy() if isinstance(v, dict) else v for k, v in layer.__dict__.items()})
        twin.input_quantizer = nn.Identity()
        twin.weight_quantizer = nn.Identity()
        twin.output_quantizer = nn.Identity()
        return twin

    def weight_parts(self) -> list[tuple[WeightQuantizer, Float[Tensor, "out *rest"]]]:
        """The weight's quantizers, each with the slice of the weight (along its inputs) that it quantizes."""
        quantizer = self.weight_quantizer
        if isinstance(quantizer, SplitQuantizer):
            return quantizer.pieces(self.weight)
        return [(quantizer, self.weight)] if isinstance(quantizer, WeightQuantizer) else []

    def quantized_weight(self) -> tuple[QuantizedWeight, ...]:
        """The weight as integers, under the present rounding, in as many parts as it has quantizers."""
        parts = self.weight_parts()
        if not parts:
            raise TypeError("this layer's weight is not quantized")
        return tuple(
            QuantizedWeight((q.codes(part).detach() - q.spec.qmin).to(torch.uint8), q.qparams, q.spec)
            for q, part in parts
        )

    def freeze_weight(self, parts: tuple[QuantizedWeight, ...]) -> None:
        """Replace the weight by what the integers stand for, and drop its quantizer: nothing is left to round."""
        weight = parts[0].dequantize() if len(parts) == 1 else torch.cat([p.dequantize() for p in parts], dim=1)
        self.weight = nn.Parameter(weight.to(self.weight), requires_grad=False)
        self.weight_quantizer = nn.Identity()


class QuantLinear(QuantLayer, nn.Linear):  # pyright: ignore[reportIncompatibleVariableOverride]
    """y = Q(Q(x) Q(W)^T + b)."""

    def forward(self, input: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch out"]:
        """As `nn.Linear`, on quantized operands."""
        return self.output_quantizer(
            F.linear(self.input_quantizer(input), self.weight_quantizer(self.weight), self.bias)
        )


class QuantConv2d(QuantLayer, nn.Conv2d):  # pyright: ignore[reportIncompatibleVariableOverride]
    """y = Q(Q(W) * Q(x) + b)."""

    def forward(self, input: Float[Tensor, "batch in height width"]) -> Float[Tensor, "batch out height2 width2"]:
        """As `nn.Conv2d`, on quantized operands."""
        quantized = self.input_quantizer(input), self.weight_quantizer(self.weight)
        return self.output_quantizer(self._conv_forward(*quantized, self.bias))


QUANT_LAYERS: dict[type[nn.Module], type[QuantLayer]] = {nn.Linear: QuantLinear, nn.Conv2d: QuantConv2d}

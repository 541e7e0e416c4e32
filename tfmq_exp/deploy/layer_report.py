"""Layers as an integer engine can execute them, and the report of which are executed how."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import nn

from tfmq_exp.denoisers.unet import LAYERS
from tfmq_exp.deploy.activation_tables import ActivationScale, activation_scale, check_bytes
from tfmq_exp.deploy.weight_tables import NotRepresentableError, SignedWeight, signed_weight
from tfmq_exp.quant.layers import QuantLayer
from tfmq_exp.quant.quantizers import SplitQuantizer
from tfmq_exp.surgery.quantized_unet import QuantizedUNet

Result = TypeVar("Result")


@dataclass(frozen=True)
class DeployedProduct:
    """A group of input channels times its part of the weight; a layer has one product unless its input is split.

    Args:
        channels: of the input.
        weight: integers; None for a float weight.
        input: quantization parameters of the input; None for a float input, or where they are not representable.
    """

    channels: int
    weight: SignedWeight | None
    input: ActivationScale | None


@dataclass(frozen=True)
class DeployedLayer:
    """A quantized layer of the network.

    Args:
        name: in the network.
        layer: the simulated layer.
        products: by groups of input channels.
        output: quantization parameters of its output, applied in floating point; None for a float output.
        why: reason for executing it in floating point; empty if it is executed in integers.
    """

    name: str
    layer: QuantLayer
    products: tuple[DeployedProduct, ...]
    output: ActivationScale | None
    why: str

    @property
    def integer(self) -> bool:
        return not self.why

    @property
    def axis(self) -> int:
        """Dimension of the channels of its input and output."""
        return 1 if isinstance(self.layer, nn.Conv2d) else -1

    @property
    def integer_weights(self) -> list[SignedWeight]:
        """Weights of its products; none unless all of them are integers."""
        weights = [product.weight for product in self.products if product.weight]
        return weights if len(weights) == len(self.products) else []

    @property
    def padding(self) -> tuple[int, int]:
        """Rows and columns of zeros on each side; ValueError if they are not given as numbers."""
        if not isinstance(self.layer, nn.Conv2d):
            return 0, 0
        if isinstance(self.layer.padding, str):
            raise ValueError(f"a convolution with padding={self.layer.padding!r}; numbers are understood")
        return self.layer.padding[0], self.layer.padding[1]

    def row(self) -> dict[str, str | int]:
        bits = sorted({product.weight.bits if product.weight else 32 for product in self.products})
        ones = any(product.weight and not product.weight.exact for product in self.products)
        return {
            "layer": self.name,
            "executed": "int8" if self.integer else "float",
            "weight_bits": "+".join(map(str, bits)),
            "products": len(self.products),
            "note": "extra channel of ones" if ones and self.integer else "",
            "why": self.why,
        }


def deployed_layers(model: QuantizedUNet) -> tuple[DeployedLayer, ...]:
    """All quantized layers of a model. Weights must be frozen, scale sources merged."""
    return tuple(deployed_layer(model, name) for name in model.plan.layers)


def deployed_layer(model: QuantizedUNet, name: str) -> DeployedLayer:
    """One quantized layer of a model."""
    layer, steps, split = model.layer(name), model.context.num_steps, model.plan.layers[name].split
    reasons: list[str] = []

    def attempt(convert: Callable[..., Result], *args: Any) -> Result | None:
        try:
            return convert(*args)
        except NotRepresentableError as error:
            reasons.append(str(error))
            return None

    weights = [attempt(signed_weight, part) for part in (layer.quantized_weight() if layer.integers else ())]
    if not weights:
        weights = [None]
        reasons.append("its weight is not quantized")
    quantizer, inputs = layer.input_quantizer, list[ActivationScale | None]()
    for part in quantizer.parts if isinstance(quantizer, SplitQuantizer) else [quantizer]:
        scale = None if isinstance(part, nn.Identity) else attempt(activation_scale, part, steps)
        if isinstance(part, nn.Identity):
            reasons.append("its input is not quantized")
        elif scale is not None:
            attempt(check_bytes, scale.table)
        inputs.append(scale)
    if isinstance(layer, nn.Conv2d) and (layer.groups != 1 or layer.padding_mode != "zeros"):
        reasons.append(f"a convolution with {layer.groups} groups and {layer.padding_mode} padding")
    sizes = (split, layer.weight.shape[1] - split) if split else (layer.weight.shape[1],)
    operands = [parts * (len(sizes) // len(parts)) for parts in (weights, inputs)]
    products = tuple(DeployedProduct(*operands) for operands in zip(sizes, *operands, strict=True))
    output = (
        None if isinstance(layer.output_quantizer, nn.Identity) else activation_scale(layer.output_quantizer, steps)
    )
    return DeployedLayer(name, layer, products, output, "; ".join(dict.fromkeys(reasons)))


def layer_report(model: QuantizedUNet, layers: Sequence[DeployedLayer]) -> list[Mapping[str, str | int]]:
    """Rows for all layers with weights, unquantized ones included, but not for networks inside quantizers."""
    quantized = {layer.name: layer.row() for layer in layers}
    inside = tuple(f"{quantizer}." for quantizer in model.activation_quantizers())
    plain = {"executed": "float", "weight_bits": "32", "products": 1, "note": "", "why": "it is not quantized"}
    names = [name for name, module in model.unet.named_modules() if isinstance(module, LAYERS)]
    return [quantized.get(name, {"layer": name, **plain}) for name in names if not name.startswith(inside)]

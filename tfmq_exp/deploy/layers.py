"""Layers as an integer engine executes them: their report, and a UNet whose layers are products of an engine."""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from tfmq_exp.denoisers.families.family import LAYERS
from tfmq_exp.deploy.activation_tables import ActivationScale, activation_scale, check_bytes
from tfmq_exp.deploy.engine import UNetOutput
from tfmq_exp.deploy.weight_tables import NotRepresentableError, SignedWeight, per_row, signed_weight
from tfmq_exp.quant.layers import QuantLayer
from tfmq_exp.quant.quantizers import SplitQuantizer
from tfmq_exp.quant.timestep_context import TimestepContext
from tfmq_exp.surgery.quantized_network import QuantizedNetwork


class Product(nn.Module):
    """Base of an engine's product of a group of input channels with its part of the weight."""

    def forward(self, x: Float[Tensor, "batch ..."], steps: Int[Tensor, "batch"]) -> Float[Tensor, "batch ..."]:
        """The product in float32, without bias, of real inputs and the sampling step of every row."""
        raise NotImplementedError


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
    def geometry(self) -> tuple[Any, Any, Any] | None:
        """Stride, padding and dilation of a convolution; ValueError for a padding that is not given as numbers."""
        if not isinstance(self.layer, nn.Conv2d):
            return None
        if isinstance(self.layer.padding, str):
            raise ValueError(f"a convolution with padding={self.layer.padding!r}; numbers are understood")
        return self.layer.stride, self.layer.padding, self.layer.dilation

    @property
    def integer_weights(self) -> list[SignedWeight]:
        """Weights of its products; none unless all of them are integers."""
        weights = [product.weight for product in self.products if product.weight]
        return weights if len(weights) == len(self.products) else []

    def row(self) -> dict[str, str | int]:
        bits = sorted({product.weight.bits if product.weight else 32 for product in self.products})
        ones = any(product.weight and not product.weight.exact for product in self.products)
        executed, note = ("int8", "extra channel of ones" if ones else "") if self.integer else ("float", "")
        stored = {"weight_bits": "+".join(map(str, bits)), "products": len(self.products)}
        return {"layer": self.name, "executed": executed, **stored, "note": note, "why": self.why}


def deployed_layers(model: QuantizedNetwork) -> tuple[DeployedLayer, ...]:
    """All quantized layers of a model. Weights must be frozen, scale sources merged."""
    return tuple(deployed_layer(model, name) for name in model.plan.layers)


def deployed_layer(model: QuantizedNetwork, name: str) -> DeployedLayer:
    """One quantized layer of a model."""
    layer, steps, split = model.layer(name), model.context.num_steps, model.plan.layers[name].split
    reasons: list[str] = []

    def attempt(convert: Callable[..., Any], *args: Any) -> Any:
        try:
            return convert(*args)
        except NotRepresentableError as error:
            reasons.append(str(error))

    def scale_of(quantizer: nn.Module) -> ActivationScale | None:
        return None if isinstance(quantizer, nn.Identity) else activation_scale(quantizer, steps)

    weights = [attempt(signed_weight, part) for part in layer.quantized_weight()] if layer.integers else [None]
    reasons += [] if layer.integers else ["its weight is not quantized"]
    quantizer = layer.input_quantizer
    parts = quantizer.parts if isinstance(quantizer, SplitQuantizer) else [quantizer]
    inputs = [attempt(scale_of, part) for part in parts]
    reasons += ["its input is not quantized"] if isinstance(quantizer, nn.Identity) else []
    for scale in filter(None, inputs):
        attempt(check_bytes, scale.table)
    if isinstance(layer, nn.Conv2d) and (layer.groups != 1 or layer.padding_mode != "zeros"):
        reasons.append(f"a convolution with {layer.groups} groups and {layer.padding_mode} padding")
    sizes = (split, layer.weight.shape[1] - split) if split else (layer.weight.shape[1],)
    operands = [each * (len(sizes) // len(each)) for each in (weights, inputs)]
    products = tuple(DeployedProduct(*operands) for operands in zip(sizes, *operands, strict=True))
    return DeployedLayer(name, layer, products, scale_of(layer.output_quantizer), "; ".join(dict.fromkeys(reasons)))


def layer_report(model: QuantizedNetwork, layers: Sequence[DeployedLayer]) -> list[Mapping[str, str | int]]:
    """Rows for all layers with weights, unquantized ones included, but not for networks inside quantizers."""
    quantized = {layer.name: layer.row() for layer in layers}
    inside = tuple(f"{quantizer}." for quantizer in model.activation_quantizers())
    plain = {"executed": "float", "weight_bits": "32", "products": 1, "note": "", "why": "it is not quantized"}
    names = [name for name, module in model.network.named_modules() if isinstance(module, LAYERS)]
    return [quantized.get(name, {"layer": name, **plain}) for name in names if not name.startswith(inside)]


class ByteProduct(Product):
    """Base of products with signed bytes, which are one weight or two that add up to it, with a channel of ones or without.

    Args:
        deployed: the layer.
        product: one of its products, in integers.
        saturates: whether the processor adds pairs of products in sixteen bits; weights above 64 are then split in two.
    """

    def __init__(self, deployed: DeployedLayer, product: DeployedProduct, saturates: bool) -> None:
        super().__init__()
        assert product.weight is not None
        assert product.input is not None
        self.weight, self.scale, self.axis = product.weight, product.input, deployed.axis
        self.summands = self.weight.summands(saturates)
        self.geometry = deployed.geometry
        dims = 3 if self.geometry else 1  # so that a value per output channel broadcasts against the output
        self.sums, self.taps = per_row(self.weight.sums, dims), self.weight.taps.float()
        self.ones_scale = per_row(self.weight.scale * self.weight.offset, dims)

    def added(self, y: Float[Tensor, "batch ..."]) -> Float[Tensor, "batch ..."]:
        """Sum of the two weights' products, and the part that the channel of ones stands for."""
        y = torch.add(*y.chunk(2, dim=self.axis)) if self.summands == 2 else y
        if self.weight.exact:
            return y
        y, inputs = y.split([len(self.weight.scale), 1], dim=self.axis)
        return y + inputs * self.ones_scale

    def of_ones(self, x: Float[Tensor, "batch ..."]) -> Tensor:
        """Product of an input of ones in the shape of `x`: sums of weights, less at borders, where padding is 0."""
        if self.geometry is None:
            return self.sums
        return F.conv2d(x.new_ones(1, 1, *x.shape[2:]), self.taps, None, *self.geometry)


class ProductLayer(nn.Module):
    """A layer as its products, plus bias and output quantizer.

    Args:
        deployed: the layer.
        products: one for each of `deployed.products`.
        context: of the model.
    """

    def __init__(self, deployed: DeployedLayer, products: Sequence[Product], context: TimestepContext) -> None:
        super().__init__()
        self.axis, self.sizes = deployed.axis, [product.channels for product in deployed.products]
        self.products, self.context, bias = nn.ModuleList(products), context, deployed.layer.bias
        self.bias = None if bias is None else per_row(bias.detach(), 3 if self.axis == 1 else 1)
        self.output_quantizer = deployed.layer.output_quantizer

    def forward(self, input: Float[Tensor, "batch ..."]) -> Float[Tensor, "batch ..."]:
        """Same signature as the simulated layer."""
        parts = input.split(self.sizes, dim=self.axis) if len(self.sizes) > 1 else [input]
        first, *others = self.products
        y = first(parts[0], self.context.index)
        for product, part in zip(others, parts[1:], strict=True):
            y = y + product(part, self.context.index)
        if self.bias is not None:
            y = y + self.bias
        return self.output_quantizer(y)


class ProductUNet(nn.Module):
    """Copy of a quantized model on a device, with product layers.

    Args:
        model: the simulated model, which is not changed.
        make_products: products of a layer; none leave the layer simulated.
        device: of the copy; inputs may be elsewhere.
    """

    def __init__(
        self, model: QuantizedNetwork, make_products: Callable[[DeployedLayer], Sequence[Product]], device: torch.device
    ) -> None:
        super().__init__()
        self.model, self.device = copy.deepcopy(model).to(device), device
        for layer in deployed_layers(self.model):
            if products := make_products(layer):
                self.model.network.set_submodule(layer.name, ProductLayer(layer, products, self.model.context))

    def forward(self, sample: Tensor, timestep: Tensor, **conditions: Tensor) -> UNetOutput:
        """Same signature as the simulated model; the result is on the device of `sample`."""
        given = {name: value.to(self.device) for name, value in conditions.items()}
        t = torch.as_tensor(timestep).to(self.device)
        return UNetOutput(self.model(sample.to(self.device), t, **given).sample.to(sample))

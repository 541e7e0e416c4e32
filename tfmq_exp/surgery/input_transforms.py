"""Transforms of a linear layer's input at run time, undone in its parameters."""

from collections import OrderedDict

import torch
from jaxtyping import Float
from torch import Tensor, nn


class Division(nn.Module):
    """Input divided by a positive scale per channel; channels come last."""

    scale: Tensor

    def __init__(self, scale: Float[Tensor, "channels"]) -> None:
        super().__init__()
        self.register_buffer("scale", scale)

    def forward(self, x: Float[Tensor, "*batch channels"]) -> Float[Tensor, "*batch channels"]:
        return x / self.scale


class Addition(nn.Module):
    """Input plus one number."""

    def __init__(self, number: float) -> None:
        super().__init__()
        self.number = number

    def forward(self, x: Float[Tensor, "*batch channels"]) -> Float[Tensor, "*batch channels"]:
        return x + self.number


class TransformedLinear(nn.Sequential):
    """A linear layer, `layer`, with a transform of its input before it, `transform`."""

    def __init__(self, transform: nn.Module, layer: nn.Linear) -> None:
        super().__init__(OrderedDict(transform=transform, layer=layer))


def linear(network: nn.Module, name: str) -> nn.Linear:
    """A float linear layer by name; ValueError for another module, whose parameters may be codes of integers by now."""
    module = network.get_submodule(name)
    if type(module) is not nn.Linear:
        raise ValueError(f"{name} is a {type(module).__name__}, not a float linear layer")
    return module


def insert_before(network: nn.Module, name: str, transform: nn.Module) -> None:
    """Put a transform in front of a linear layer, which becomes `<name>.layer`, the transform `<name>.transform`."""
    layer = linear(network, name)
    network.set_submodule(name, TransformedLinear(transform, layer).train(layer.training), strict=True)


def changed(old: Tensor, value: Float[Tensor, "..."]) -> None:
    """Write new numbers into a parameter, rounded once to its precision."""
    with torch.no_grad():
        old.copy_(value)


def bias_of(layer: nn.Linear) -> Tensor:
    """The bias of a linear layer; one of zeros is added where it has none."""
    if layer.bias is None:
        zeros = layer.weight.new_zeros(layer.out_features)
        layer.bias = nn.Parameter(zeros, requires_grad=layer.weight.requires_grad)
    return layer.bias


def shift_input(network: nn.Module, name: str, number: float) -> None:
    """Add a number to a linear layer's input and take what that adds from its bias: b' = b - c W 1.

    Outputs of GELU become positive by 0.171875, for codes without a sign (SVDQuant's release); SiLU needs 0.2785. The result is exact
    for linear layers: a convolution would pad with zeros what should be padded with `number`.

    Raises:
        ValueError: the layer is no float linear layer, or the number is not finite.
    """
    layer = linear(network, name)
    if not abs(number) < float("inf"):
        raise ValueError(f"the inputs of {name} can be shifted by a finite number, not by {number}")
    insert_before(network, name, Addition(number))
    bias = bias_of(layer)
    changed(bias, bias.double() - number * layer.weight.double().sum(dim=1))

"""A linear layer as a residual and a branch of low rank beside it (SVDQuant, arXiv 2411.05007, equation 5)."""

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from tfmq_exp.surgery.input_transforms import changed, linear


class LowRankBranch(nn.Module):
    """y = layer(x) + x A^T B^T, where the layer's weight is W - B A: only the layer is to be quantized.

    Args:
        layer: with the residual weight, and the bias.
        a: from the inputs to the rank.
        b: from the rank to the outputs.
    """

    a: Tensor
    b: Tensor

    def __init__(self, layer: nn.Linear, a: Float[Tensor, "rank in"], b: Float[Tensor, "out rank"]) -> None:
        super().__init__()
        self.layer = layer
        self.register_buffer("a", a)
        self.register_buffer("b", b)

    def forward(self, x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch out"]:
        return self.layer(x) + F.linear(F.linear(x, self.a), self.b)


def add_branch(network: nn.Module, name: str, a: Float[Tensor, "rank in"], b: Float[Tensor, "out rank"]) -> None:
    """Move B A from a linear layer's weight into a branch, which reads the same input; the network computes the same.

    Raises:
        ValueError: no float linear layer, or factors of other shapes than its weight's.
    """
    layer = linear(network, name)
    inner = (b.shape[-1], layer.in_features), (layer.out_features, a.shape[0])
    if (tuple(a.shape), tuple(b.shape)) != inner:
        raise ValueError(
            f"factors of {name} must be [rank, {layer.in_features}] and [{layer.out_features}, rank], "
            f"got {list(a.shape)} and {list(b.shape)}"
        )
    changed(layer.weight, layer.weight.double() - b.double() @ a.double())
    branch = LowRankBranch(layer, a.to(layer.weight), b.to(layer.weight))
    network.set_submodule(name, branch.train(layer.training), strict=True)

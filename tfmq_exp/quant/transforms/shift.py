"""A shift that makes activations non-negative, so that unsigned integers serve them: SVDQuant's inputs after GELU (arXiv 2411.05007, its code).

(x + c) W^T + b' = x W^T + b with b' = b - c times the sum of each output's weights.
"""

from jaxtyping import Float
from torch import Tensor

from tfmq_exp.quant.grids.groups import quantize_groups
from tfmq_exp.quant.spec import QuantSpec

GELU_SHIFT = (
    0.171875  # above GELU's smallest value, -0.17; exact in half precision (mit-han-lab/deepcompressor 69f3473)
)


def quantize_shifted(
    x: Float[Tensor, "*rest channels"], bits: int, size: int | None, shift: float = GELU_SHIFT
) -> Float[Tensor, "*rest channels"]:
    """Simulated quantization of x + shift by unsigned integers per token and group; the result keeps the shift.

    A layer takes it with `shifted_bias`. Padding, which is 0, comes before the shift. What is below -shift is clipped to it.
    """
    return quantize_groups((x + shift).clamp(min=0), QuantSpec(bits, "unsigned"), size)


def shifted_bias(
    weight: Float[Tensor, "outputs *rest"], bias: Float[Tensor, "outputs"] | None, shift: float = GELU_SHIFT
) -> Float[Tensor, "outputs"]:
    """The bias b' with which a layer of shifted inputs has the output of `bias` without the shift."""
    moved = -shift * weight.flatten(1).sum(1)
    return moved if bias is None else bias + moved

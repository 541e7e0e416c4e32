"""Temporal features looked up instead of computed (Temporal Feature Matters, arXiv 2407.19547: cache-based maintenance)."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from tfmq_exp.quant.functional import qparams_from_range, quantize
from tfmq_exp.quant.layers import QuantizedWeight
from tfmq_exp.quant.observers import MinMax
from tfmq_exp.quant.spec import QuantSpec
from tfmq_exp.quant.timestep_context import TimestepContext


class CachedFeature(nn.Module):
    """Replaces an embedding projection: returns the stored feature of each row's step, whatever its input."""

    table: Tensor

    def __init__(self, integers: QuantizedWeight, context: TimestepContext) -> None:
        super().__init__()
        self.context = context
        self.register_buffer("table", integers.dequantize(), persistent=False)

    def forward(self, embedding: Tensor) -> Float[Tensor, "batch channels"]:
        return self.table[self.context.index]


class Unneeded(nn.Identity):
    """Replaces a layer whose output is not read any more."""


def cached(features: Float[Tensor, "steps channels"], bits: int) -> QuantizedWeight:
    """Float temporal features as integers with one range for each step, by min and max."""
    spec = QuantSpec(bits, "affine", axis=0)
    qparams = qparams_from_range(*MinMax()(features, spec), spec)
    return QuantizedWeight(quantize(features, qparams, spec).to(torch.uint8), qparams, spec)

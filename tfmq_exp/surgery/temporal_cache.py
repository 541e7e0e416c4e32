"""Temporal features looked up instead of computed (Temporal Feature Matters, arXiv 2407.19547: cache-based maintenance)."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from tfmq_exp.quant.functional import qparams_from_range, quantize
from tfmq_exp.quant.layers import QuantizedWeight
from tfmq_exp.quant.observers import MinMax
from tfmq_exp.quant.spec import QuantSpec
from tfmq_exp.quant.timestep_context import TimestepContext


class CachedFeature(nn.Module):
    """Stands for an embedding projection: returns the stored feature of each row's step, whatever it is given."""

    table: Tensor

    def __init__(self, integers: QuantizedWeight, context: TimestepContext) -> None:
        super().__init__()
        self.context = context
        self.register_buffer("table", integers.dequantize(), persistent=False)

    def forward(self, embedding: Any) -> Float[Tensor, "batch channels"]:
        """One row of the table for every row of the batch."""
        return self.table[self.context.index]


class Unneeded(nn.Module):
    """Stands for a layer whose output nobody reads any more."""

    def forward(self, x: Tensor) -> Tensor:
        """What came in."""
        return x


def cached(features: Float[Tensor, "steps channels"], bits: int) -> QuantizedWeight:
    """Float temporal features as integers with one grid for each step, which min and max place exactly."""
    spec = QuantSpec(bits, "affine", axis=0)
    qparams = qparams_from_range(*MinMax()(features, spec), spec)
    return QuantizedWeight(quantize(features, qparams, spec).to(torch.uint8), qparams, spec)

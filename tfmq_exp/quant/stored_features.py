"""Temporal features that are stored instead of computed: a table, or a basis with coefficients over time."""

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from tfmq_exp.quant.functional import dequantize, qparams_from_range, quantize
from tfmq_exp.quant.layers import QuantizedWeight
from tfmq_exp.quant.observers import MinMax
from tfmq_exp.quant.spec import QParams, QuantSpec
from tfmq_exp.quant.timestep_context import TimestepContext

linalg: Any = torch.linalg  # has no types


class StoredFeature(nn.Module):
    """Base of what replaces a layer: returns a stored feature for each row's step and condition, whatever its input.

    Its integers are buffers, which follow the network to a device; the artefact has them apart from the network's numbers.
    """

    codes: Tensor
    scale: Tensor
    zero_point: Tensor

    def __init__(self, integers: QuantizedWeight, context: TimestepContext) -> None:
        super().__init__()
        self.context, self.spec = context, integers.spec
        for name, value in {"codes": integers.codes, **integers.qparams._asdict()}.items():
            self.register_buffer(name, value.detach(), persistent=False)

    @property
    def integers(self) -> QuantizedWeight:
        return QuantizedWeight(self.codes, QParams(self.scale, self.zero_point), self.spec)

    def layout(self) -> Mapping[str, Any]:
        """Sizes of what is stored beside the integers, as plain data."""
        return {}

    @property
    def size(self) -> int:
        """Bytes in the artefact: codes at their bit-width, scales, zero points of a byte, and further numbers."""
        ranges = (4 + (self.spec.scheme == "affine")) * self.scale.numel()
        further = sum(value.nbytes for value in self.state_dict().values())
        return -(-self.codes.numel() * self.spec.bits // 8) + ranges + further


class CachedFeature(StoredFeature):
    """A table by step and condition (Temporal Feature Matters, arXiv 2407.19547: cache-based maintenance).

    The rows of the integers are steps, conditions within a step, and within these the groups of channels with one range.
    """

    def forward(self, embedding: Tensor) -> Float[Tensor, "batch channels"]:
        context, conditions = self.context, 1 if self.context.conditions is None else len(self.context.conditions)
        place = context.index if conditions == 1 else context.index * conditions + context.condition
        codes, scale, zero = (
            value.reshape(context.num_steps * conditions, -1, value.shape[1])[place]
            for value in (self.codes, self.scale, self.zero_point)
        )
        return dequantize(codes.to(scale.dtype) + self.spec.qmin, QParams(scale, zero)).flatten(1)


class BasisFeature(StoredFeature):
    """mean + sum_k c_k(t, condition) b_k: coefficients at some timesteps, linear in between, the last ones beyond.

    Integers are the mean and the vectors b_k, [1 + rank, channels], a range each; the timesteps and coefficients are real numbers.

    Args:
        integers: mean first.
        timesteps: ascending, as the network is given them.
        coefficients: of these.
        context: of the rows.
    """

    timesteps: Tensor
    coefficients: Tensor

    def __init__(
        self,
        integers: QuantizedWeight,
        timesteps: Float[Tensor, "points"],
        coefficients: Float[Tensor, "points conditions rank"],
        context: TimestepContext,
    ) -> None:
        super().__init__(integers, context)
        self.register_buffer("timesteps", timesteps.float())
        self.register_buffer("coefficients", coefficients.float())

    def layout(self) -> Mapping[str, Any]:
        return {"coefficients": list(self.coefficients.shape)}

    def forward(self, embedding: Tensor) -> Float[Tensor, "batch channels"]:
        t, last = self.context.t.to(self.timesteps), len(self.timesteps) - 1
        right = torch.searchsorted(self.timesteps, t).clamp(min(1, last), last)
        left = (right - 1).clamp(min=0)
        a, b = self.timesteps[left], self.timesteps[right]
        share = ((t - a) / (b - a).clamp(min=torch.finfo(a.dtype).tiny)).clamp(0, 1)[:, None]
        at, condition = self.coefficients, self.context.condition
        # exact at both ends, where a stored timestep stands
        coefficients = torch.lerp(at[left, condition], at[right, condition], share)
        real = self.integers.dequantize()
        return real[:1] + coefficients @ real[1:]


class Unneeded(nn.Module):
    """Replaces a layer, or an embedding of classes, whose output is not read any more: zeros of its shape."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.embeds = isinstance(layer, nn.Embedding)
        self.width = layer.embedding_dim if self.embeds else layer.out_features

    def forward(self, input: Tensor) -> Tensor:
        rows = input.shape if self.embeds else input.shape[:-1]
        zero = torch.zeros((), device=input.device, dtype=torch.float32 if self.embeds else input.dtype)
        return zero.expand(*rows, self.width)


def cached(features: Float[Tensor, "rows channels"], bits: int, channels: int | None = None) -> QuantizedWeight:
    """Float temporal features as integers with one range for each row, or for so many `channels` of it, by min and max.

    A feature whose channels are no multiple of that has one range.
    """
    rows = features if channels is None or features.shape[1] % channels else features.reshape(-1, channels)
    spec = QuantSpec(bits, "affine", axis=0)
    qparams = qparams_from_range(*MinMax()(rows, spec), spec)
    return QuantizedWeight(quantize(rows, qparams, spec).to(torch.uint8), qparams, spec)


def fitted_basis(
    features: Float[Tensor, "points conditions channels"],
    timesteps: Float[Tensor, "points"],
    context: TimestepContext,
    *,
    bits: int,
    rank: int | None,
    tolerance: float,
) -> BasisFeature:
    """The principal vectors of a feature over time and conditions, and the coefficients that fit best with their integers.

    Args:
        features: at these timesteps, for every condition.
        timesteps: ascending.
        context: of the rows.
        bits: of the mean and the vectors.
        rank: number of vectors, at most as many as there are; None for the smallest one within the tolerance.
        tolerance: squared error of the real vectors over the features' squares.
    """
    rows = features.double().flatten(0, 1)
    mean = rows.mean(0, keepdim=True)
    decomposition = linalg.svd(rows - mean, full_matrices=False)
    vectors: Tensor = decomposition.Vh
    energy: Tensor = decomposition.S.square()
    left_out = torch.cat(
        [energy.flip(0).cumsum(0).flip(0), energy.new_zeros(1)]
    )  # [rank] is the error of so many vectors
    enough = int((left_out > tolerance * rows.square().sum()).sum())
    count = max(1, min(len(energy), enough if rank is None else rank))
    integers = cached(torch.cat([mean, vectors[:count]]).float(), bits)
    real = integers.dequantize().double()
    coefficients: Tensor = linalg.lstsq(real[1:].mT, (rows - real[:1]).mT).solution.mT
    return BasisFeature(integers, timesteps, coefficients.reshape(*features.shape[:2], count), context)

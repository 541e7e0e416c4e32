"""A branch of low rank beside a quantized weight: W = L + R, L = up down, y = Q(x) Q(R)^T + x L^T.

SVDQuant (arXiv 2411.05007). The branch keeps the largest singular values in high precision, so that what is left has
smaller outliers.
"""

from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import linear

linalg: Any = torch.linalg  # has no types
Weight = Float[Tensor, "outputs inputs"]


class Branch(NamedTuple):
    """Factors of a weight of low rank: `down` [rank, inputs], `up` [outputs, rank]."""

    down: Float[Tensor, "rank inputs"]
    up: Float[Tensor, "outputs rank"]

    @property
    def weight(self) -> Weight:
        """Their product."""
        return self.up @ self.down


class LowRankWeight(NamedTuple):
    """A weight as a branch and the quantized values of what it leaves; output errors of all iterations."""

    branch: Branch
    quantized: Weight
    errors: list[float]


def low_rank(weight: Weight, rank: int) -> Branch:
    """The branch of a rank that is nearest to a weight: its largest singular values, computed in double precision.

    `down` has orthonormal rows; `up` has the singular values. ValueError for a rank outside 1 .. min(outputs, inputs).
    """
    most = min(weight.shape)
    if not 1 <= rank <= most:
        raise ValueError(f"rank must be from 1 to {most} for a weight of shape {tuple(weight.shape)}, got {rank}")
    u, s, vh = linalg.svd(weight.double(), full_matrices=False)
    return Branch(vh[:rank].to(weight.dtype), (u[:, :rank] * s[:rank]).to(weight.dtype))


def shared_low_rank(weights: Sequence[Weight], rank: int) -> list[Branch]:
    """Branches of several weights that read one input, as queries, keys and values do; they have one `down`."""
    down, up = low_rank(torch.cat(list(weights)), rank)
    ends = accumulate(len(weight) for weight in weights)
    return [Branch(down, up[end - len(weight) : end]) for weight, end in zip(weights, ends, strict=True)]


def iterated_low_rank(
    weight: Weight,
    rank: int,
    quantize: Callable[[Weight], Weight],
    error: Callable[[Branch, Weight], float],
    iterations: int = 100,
) -> LowRankWeight:
    """The best of some iterations L_k = SVD_rank(W - Q_(k-1)), Q_k = Q(W - L_k), Q_0 = 0, which end at the first larger error.

    mit-han-lab/deepcompressor 69f3473; one iteration is the SVD alone. Of equal errors the later one counts.

    Args:
        weight: of a linear layer, or several stacked that read one input; balanced before.
        rank: of the branch.
        quantize: simulated quantization of a weight.
        error: of the layer's output with this branch and these quantized values.
        iterations: at most that many, at least 1.

    Raises:
        ValueError: rank or iterations out of range; an error that is not a number.
    """
    if iterations < 1:
        raise ValueError(f"iterations must be at least 1, got {iterations}")
    errors: list[float] = []
    best: tuple[Branch, Weight] | None = None
    quantized = torch.zeros_like(weight)
    for _ in range(iterations):
        branch = low_rank(weight - quantized, rank)
        quantized = quantize(weight - branch.weight)
        errors.append(error(branch, quantized))
        if not errors[-1] <= min(errors):
            break
        best = branch, quantized
    if best is None:
        raise ValueError(f"the output's error is {errors[0]}: weights and inputs must be finite")
    return LowRankWeight(*best, errors)


def low_rank_linear(
    x: Float[Tensor, "*rest inputs"],
    quantized_x: Float[Tensor, "*rest inputs"],
    branch: Branch,
    quantized: Weight,
    bias: Float[Tensor, "outputs"] | None = None,
) -> Float[Tensor, "*rest outputs"]:
    """Output Q(x) Q(R)^T + (x down^T) up^T + bias; the branch reads the input that is not quantized.

    Args:
        x: input.
        quantized_x: the same, quantized; the same tensor for quantized weights alone.
        branch: of the layer.
        quantized: the quantized rest of its weight.
        bias: of the layer, if it has one.
    """
    return linear(quantized_x, quantized, bias) + linear(linear(x, branch.down), branch.up)

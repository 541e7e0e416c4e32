"""Channel balance: x W^T = (x / s) (W s)^T with one s per input channel, which moves outliers of activations into weights.

SmoothQuant (arXiv 2211.10438, eq. 3 and 4) and what ViDiT-Q (arXiv 2406.02540), SVDQuant (arXiv 2411.05007) and PTQ4DiT
(arXiv 2405.16005) make of it: they differ in how the channels' maxima are collected and in the exponents.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

Channels = Float[Tensor, "channels"]


def channel_maxima(x: Float[Tensor, "*rest channels"]) -> Channels:
    """Largest magnitude of every channel, over all else: rows of a weight, or samples and tokens."""
    return x.abs().flatten(0, -2).amax(0)


def row_maxima(x: Float[Tensor, "rows *tokens channels"]) -> Float[Tensor, "rows channels"]:
    """Largest magnitude of every channel over each row's tokens."""
    return x.abs().reshape(len(x), -1, x.shape[-1]).amax(1)


def tied_maxima(weights: Iterable[Float[Tensor, "outputs channels"]]) -> Channels:
    """Largest magnitude of every input channel in several weights that read one input."""
    return torch.stack([channel_maxima(weight) for weight in weights]).amax(0)


def running_maxima(
    running: Channels | None, x: Float[Tensor, "rows *tokens channels"], momentum: float = 0.95
) -> Channels:
    """Moving average over batches of the mean of `row_maxima`; the first batch (`running` None) counts as it is.

    ViDiT-Q (arXiv 2406.02540, its code). `momentum` is the weight of the past, in [0, 1).
    """
    maxima = row_maxima(x).mean(0)
    return maxima if running is None else momentum * running + (1 - momentum) * maxima


def balance(activations: Channels, weights: Channels, alpha: float, beta: float, epsilon: float = 0.0) -> Channels:
    """The factor s = activations^alpha / (weights + epsilon)^beta of every channel, from largest magnitudes.

    s is 1 where that is 0 or not finite: channels without values, of the activation or of the weight.

    Args:
        activations: largest magnitudes of the input channels.
        weights: those of the weight's columns.
        alpha: 0 .. 1; 0.5 in PTQ4DiT, 0.3 and 0.11 in ViDiT-Q, searched in SVDQuant.
        beta: 0 .. 1; 1 - alpha in all of them, or 0 (SVDQuant).
        epsilon: added to the weights' maxima; 1e-8 in PTQ4DiT.
    """
    s = activations.pow(alpha) / (weights + epsilon).pow(beta)
    return torch.where(s.isfinite() & (s != 0), s, torch.ones_like(s))


def balance_exponents(steps: int = 20) -> list[tuple[float, float]]:
    """SVDQuant's candidates (alpha, beta): (0, 0), then (a, 0), then (a, 1 - a), a = 1 / steps .. 1 - 1 / steps: 2 steps - 1."""
    inner = [i / steps for i in range(1, steps)]
    return [(0.0, 0.0), *((a, 0.0) for a in inner), *((a, 1 - a) for a in inner)]


class BalanceSearch(NamedTuple):
    """Result of `search_balance`: the best factor, its place among the candidates, and all their errors."""

    scale: Channels
    best: int
    errors: list[float]


def search_balance(
    activations: Channels,
    weights: Channels,
    exponents: Sequence[tuple[float, float]],
    error: Callable[[Channels], float],
) -> BalanceSearch:
    """The factor with the smallest `error`, for example of the output of the layer that it balances; of equals the last.

    Raises:
        ValueError: no candidates, or none with an error that is a number.
    """
    scales = [balance(activations, weights, alpha, beta) for alpha, beta in exponents]
    errors = [error(scale) for scale in scales]
    order = [i for i, value in enumerate(errors) if value == value]
    if not order:
        raise ValueError(f"expected candidates whose error is a number, got the errors {errors}")
    best = min(order, key=lambda i: (errors[i], -i))
    return BalanceSearch(scales[best], best, errors)

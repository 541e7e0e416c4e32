"""Searched grids: of a few candidates for every range, the one whose quantization error is smallest."""

from collections.abc import Iterable, Iterator, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from tfmq_exp.quant.functional import fake_quantize
from tfmq_exp.quant.observers import Range
from tfmq_exp.quant.spec import QParams, QuantSpec

PERCENTILES = (0.999, 0.9999, 0.99999)  # PTQ4DiT's


def least_error(
    values: Float[Tensor, "*ranges values"], candidates: Iterable[QParams], spec: QuantSpec, p: float = 2.0
) -> QParams:
    """The candidate with the smallest mean p-th power of the error, for every range along the last axis; of equals the first.

    Candidates are evaluated one after the other, so that activations of a whole calibration set need one copy. Scale and zero
    point have the shape [..., 1]. ValueError without candidates.
    """
    best, least = None, torch.empty(0)
    for q in candidates:
        error = (fake_quantize(values, q, spec) - values).abs_().pow_(p).mean(-1, keepdim=True)
        if best is None:
            best, least = q, error
            continue
        better = error < least
        best = QParams(*(torch.where(better, new, old) for new, old in zip(q, best, strict=True)))
        least = torch.where(better, error, least)
    if best is None:
        raise ValueError("a search needs at least one candidate")
    return best


def shrunken_ranges(lo: Tensor, hi: Tensor, count: int = 100, shrink: float = 0.001) -> Iterator[Range]:
    """[lo, hi] times 1, 1 - shrink, .., 1 - (count - 1) shrink: Q-DiT's candidates (arXiv 2406.17343, its code), with p = 2.4."""
    return ((lo * (1.0 - i * shrink), hi * (1.0 - i * shrink)) for i in range(count))


def percentile_ranges(
    values: Float[Tensor, "*ranges values"], shares: Sequence[float] = PERCENTILES, *, from_zero: bool = False
) -> Iterator[Range]:
    """The quantiles 1 - share and share of every range along the last axis: PTQ4DiT's candidates (arXiv 2405.16005, its code).

    `from_zero`: ranges start at 0, as PTQ4DiT's for the softmax. ValueError for a share outside (0.5, 1]; some versions of
    torch.quantile refuse more than 2**24 values.
    """
    if wrong := [share for share in shares if not 0.5 < share <= 1]:
        raise ValueError(f"shares must be above 0.5 and at most 1, got {wrong[0]}")
    precise = values.to(torch.promote_types(values.dtype, torch.float32))  # torch.quantile knows no half precision
    both = [*shares, *(1 - share for share in shares)]
    ends = torch.quantile(precise, precise.new_tensor(both), dim=-1, keepdim=True)
    for hi, lo in zip(*ends.chunk(2), strict=True):
        yield (torch.zeros_like(lo) if from_zero else lo), hi

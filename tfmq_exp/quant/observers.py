"""Observers: from a tensor to the [lo, hi] that its integers should cover.

An observer is a frozen dataclass, called with the tensor and its spec. It treats all channels (and all candidates) at once. lo and hi
have the spec's `range_shape` and may be of a wider type than the tensor.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from jaxtyping import Float
from torch import Tensor

from tfmq_exp.core.validate import BYTES, COUNT, POWER, SHARE, SWITCH, check_fields, optional
from tfmq_exp.quant.functional import fake_quantize, qparams_from_range
from tfmq_exp.quant.spec import QParams, QuantSpec

Range = tuple[Float[Tensor, "*range"], Float[Tensor, "*range"]]


class Observer(Protocol):
    """Maps a tensor to its range: lo and hi with shape `spec.range_shape(x.shape)`."""

    def __call__(self, x: Float[Tensor, "*shape"], spec: QuantSpec) -> Range: ...


def per_range(x: Float[Tensor, "*shape"], spec: QuantSpec) -> Float[Tensor, "ranges values"]:
    """The tensor with one row per range."""
    return x.reshape(1, -1) if spec.axis is None else x.movedim(spec.axis, 0).flatten(1)


def include_zero(lo: Tensor, hi: Tensor) -> Range:
    """Widen a range so that 0 has a code: padding and ReLU need it, and the zero point fits the bits."""
    return lo.clamp(max=0), hi.clamp(min=0)


def row_ends(rows: Float[Tensor, "ranges values"]) -> Range:
    return rows.amin(dim=1).double(), rows.amax(dim=1).double()


def chunks(count: int, size: int) -> list[slice]:
    """0 .. count - 1 in consecutive slices of at most `size`, at least 1."""
    return [slice(start, start + max(1, size)) for start in range(0, count, max(1, size))]


def lp_errors(values: Tensor, q: QParams, spec: QuantSpec, p: float) -> Float[Tensor, "ranges candidates"]:
    """Mean p-th power of the quantization error of every candidate.

    Args:
        values: [ranges, 1, values].
        q: scale and zero point of the candidates, [ranges, candidates, 1].
        spec: the integer range.
        p: exponent, above 0.
    """
    return (fake_quantize(values, q, spec) - values).abs_().pow_(p).mean(dim=2)


@dataclass(frozen=True)
class MinMax:
    """Smallest and largest value; with `include_zero` min(x, 0) and max(x, 0)."""

    include_zero: bool = True

    def __post_init__(self) -> None:
        check_fields(self, include_zero=SWITCH)

    def __call__(self, x: Float[Tensor, "*shape"], spec: QuantSpec) -> Range:
        rows, shape = per_range(x, spec), spec.range_shape(x.shape)
        lo, hi = rows.amin(dim=1).reshape(shape), rows.amax(dim=1).reshape(shape)
        return include_zero(lo, hi) if self.include_zero else (lo, hi)


@dataclass(frozen=True)
class SymmetricMSEObserver:
    """The symmetric threshold whose quantization error has the smallest L_p norm: PTQ4DM's range (arXiv 2211.15736, QDrop's code).

    Thresholds R i / candidates, i = 1 .. candidates, R the largest magnitude, are tried together; ties keep the smallest.
    The range is [-threshold, threshold], and one-sided for a tensor without values on the other side.

    Args:
        p: of the norm.
        candidates: how many thresholds.
        max_values: evaluate candidates on at most that many values of each range, evenly spaced; None takes all, which for
            the activations of a large batch costs more than everything else in calibration.
        memory: bytes that the candidates may take at once; they are tried in chunks that fit.
    """

    p: float = 2.4
    candidates: int = 100
    max_values: int | None = None
    memory: int = 2**28

    def __post_init__(self) -> None:
        check_fields(self, p=POWER, candidates=COUNT, max_values=optional(COUNT), memory=BYTES)

    def __call__(self, x: Float[Tensor, "*shape"], spec: QuantSpec) -> Range:
        rows, shape = per_range(x, spec), spec.range_shape(x.shape)
        lo, hi = row_ends(rows)
        largest = torch.maximum(lo.abs(), hi.abs())
        if self.max_values is not None:
            rows = rows[:, :: max(1, rows.shape[1] // self.max_values)]
        shares = torch.arange(1, self.candidates + 1, dtype=torch.float64, device=x.device) / self.candidates
        row_spec = QuantSpec(spec.bits, spec.scheme)

        def ends(share: Tensor) -> Range:
            reach = largest[:, None] * share
            return -reach * (lo < 0)[:, None], reach * (hi > 0)[:, None]

        errors: list[Tensor] = []
        for part in chunks(self.candidates, self.memory // (4 * rows.element_size() * rows.numel())):
            low, high = ends(shares[part])
            q = qparams_from_range(low[..., None], high[..., None], row_spec)
            errors.append(lp_errors(rows[:, None], q, row_spec, self.p))
        low, high = ends(shares[torch.cat(errors, dim=1).argmin(dim=1)][:, None])
        return low.reshape(shape), high.reshape(shape)


@dataclass(frozen=True)
class LpObserver:
    """The shrunken range whose quantization error has the smallest L_p norm (LAPQ, arXiv 1911.07190; p = 2.4 as in BRECQ).

    `candidates` ranges s * [lo, hi] with s = 1, 1 - shrink, 1 - 2 shrink, ... are tried together; ties keep the widest.

    Args:
        p: of the norm.
        candidates: how many ranges.
        shrink: share of the range by which each candidate is smaller than the one before.
        include_zero: widen the range to 0 before the search, which keeps the zero point inside the integers. The releases
            of Q-Diffusion and TFMQ-DM do not (False): a one-sided tensor then gets a zero point that no engine can store.
        memory: bytes that the candidates may take at once; they are split into chunks that fit.
    """

    p: float = 2.4
    candidates: int = 80
    shrink: float = 0.01
    include_zero: bool = True
    memory: int = 2**28

    def __post_init__(self) -> None:
        check_fields(self, p=POWER, candidates=COUNT, shrink=SHARE, include_zero=SWITCH, memory=BYTES)
        if self.shrink * (self.candidates - 1) >= 1:
            raise ValueError(
                f"{self.candidates} candidates, each smaller by shrink={self.shrink}, must end above 0: "
                f"shrink must be below {1 / (self.candidates - 1):.3g}"
            )

    def __call__(self, x: Float[Tensor, "*shape"], spec: QuantSpec) -> Range:
        rows, shape = per_range(x, spec), spec.range_shape(x.shape)
        lo, hi = include_zero(*row_ends(rows)) if self.include_zero else row_ends(rows)
        factors = 1.0 - self.shrink * torch.arange(self.candidates, dtype=torch.float64, device=x.device)
        low, high = lo[:, None, None] * factors[:, None], hi[:, None, None] * factors[:, None]
        row_spec = QuantSpec(spec.bits, spec.scheme)
        best: list[Tensor] = []
        for part in chunks(len(rows), self.memory // (4 * rows.element_size() * rows.shape[1] * self.candidates)):
            q = qparams_from_range(low[part], high[part], row_spec)
            best.append(lp_errors(rows[part, None], q, row_spec, self.p).argmin(dim=1))
        factor = factors[torch.cat(best)]
        return (lo * factor).reshape(shape), (hi * factor).reshape(shape)

"""Observers: from a tensor to the [lo, hi] that its integers should cover.

An observer is a frozen dataclass, called with the tensor and its spec. It treats all channels (and all candidates) at once. lo and hi
have the spec's `range_shape` and may be of a wider type than the tensor.
"""

from dataclasses import dataclass
from typing import Annotated, Protocol

import torch
from jaxtyping import Float
from torch import Tensor

from tfmq_exp.core.validate import BYTES, COUNT, POSITIVE, POSITIVE_SHARE, POWER, SHARE, Checked, optional
from tfmq_exp.quant.functional import fake_quantize, qparams_from_range
from tfmq_exp.quant.spec import QParams, QuantSpec

Range = tuple[Float[Tensor, "*range"], Float[Tensor, "*range"]]


class Observer(Protocol):
    """Maps a tensor to its range: lo and hi with shape `spec.range_shape(x.shape)`."""

    def __call__(self, x: Float[Tensor, "*shape"], spec: QuantSpec) -> Range: ...


class RowObserver(Checked):
    """Base of observers of the values of one range after the other: `ends` of a tensor with one row per range."""

    def __call__(self, x: Float[Tensor, "*shape"], spec: QuantSpec) -> Range:
        lo, hi = self.ends(per_range(x, spec), spec)
        return lo.reshape(spec.range_shape(x.shape)), hi.reshape(spec.range_shape(x.shape))

    def ends(self, rows: Float[Tensor, "ranges values"], spec: QuantSpec) -> Range:
        """Lo and hi of every row."""
        raise NotImplementedError


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
    """Mean p-th power of the error of `values`, [ranges, 1, values], for every candidate of `q`, [ranges, candidates, 1]."""
    return (fake_quantize(values, q, spec) - values).abs_().pow_(p).mean(dim=2)


@dataclass(frozen=True)
class MinMax(RowObserver):
    """Smallest and largest value; with `include_zero` min(x, 0) and max(x, 0)."""

    include_zero: bool = True

    def ends(self, rows: Float[Tensor, "ranges values"], spec: QuantSpec) -> Range:
        lo, hi = rows.amin(dim=1), rows.amax(dim=1)
        return include_zero(lo, hi) if self.include_zero else (lo, hi)


@dataclass(frozen=True)
class SymmetricMSEObserver(RowObserver):
    """The symmetric threshold whose quantization error has the smallest L_p norm: PTQ4DM's range (arXiv 2211.15736, QDrop's code).

    Thresholds R i / candidates, i = 1 .. candidates, R the largest magnitude, are tried together; ties keep the smallest.
    The range is [-threshold, threshold], and one-sided for a tensor without values on the other side.

    Args:
        p: of the norm.
        candidates: how many thresholds.
        max_values: evaluate candidates on at most that many values of each range, evenly spaced; None takes all, which for
            the activations of a large batch costs more than everything else in calibration.
        memory: bytes that the candidates may take at once.
    """

    p: Annotated[float, POWER] = 2.4
    candidates: Annotated[int, COUNT] = 100
    max_values: Annotated[int | None, optional(COUNT)] = None
    memory: Annotated[int, BYTES] = 2**28

    def ends(self, rows: Float[Tensor, "ranges values"], spec: QuantSpec) -> Range:
        lo, hi = row_ends(rows)
        largest = torch.maximum(lo.abs(), hi.abs())
        if self.max_values is not None:
            rows = rows[:, :: max(1, rows.shape[1] // self.max_values)]
        shares = torch.arange(1, self.candidates + 1, dtype=torch.float64, device=rows.device) / self.candidates
        row_spec = QuantSpec(spec.bits, spec.scheme)

        def threshold(share: Tensor) -> Range:
            reach = largest[:, None] * share
            return -reach * (lo < 0)[:, None], reach * (hi > 0)[:, None]

        errors: list[Tensor] = []
        for part in chunks(self.candidates, self.memory // (4 * rows.element_size() * rows.numel())):
            low, high = threshold(shares[part])
            q = qparams_from_range(low[..., None], high[..., None], row_spec)
            errors.append(lp_errors(rows[:, None], q, row_spec, self.p))
        return threshold(shares[torch.cat(errors, dim=1).argmin(dim=1)][:, None])


@dataclass(frozen=True)
class LpObserver(RowObserver):
    """The shrunken range whose quantization error has the smallest L_p norm (LAPQ, arXiv 1911.07190; p = 2.4 as in BRECQ).

    `candidates` ranges s * [lo, hi] with s = 1, 1 - shrink, 1 - 2 shrink, ... are tried together; ties keep the widest.

    Args:
        p: of the norm.
        candidates: how many ranges.
        shrink: share of the range by which each candidate is smaller than the one before.
        include_zero: widen the range to 0 before the search, which keeps the zero point inside the integers. The releases
            of Q-Diffusion and TFMQ-DM do not (False): a one-sided tensor then gets a zero point that no engine can store.
        memory: bytes that the candidates may take at once.
    """

    p: Annotated[float, POWER] = 2.4
    candidates: Annotated[int, COUNT] = 80
    shrink: Annotated[float, SHARE] = 0.01
    include_zero: bool = True
    memory: Annotated[int, BYTES] = 2**28

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.shrink * (self.candidates - 1) >= 1:
            most = f"shrink must be below {1 / (self.candidates - 1):.3g}"
            raise ValueError(
                f"{self.candidates} candidates, each smaller by shrink={self.shrink}, must end above 0: {most}"
            )

    def ends(self, rows: Float[Tensor, "ranges values"], spec: QuantSpec) -> Range:
        lo, hi = include_zero(*row_ends(rows)) if self.include_zero else row_ends(rows)
        factors = 1.0 - self.shrink * torch.arange(self.candidates, dtype=torch.float64, device=rows.device)
        low, high = lo[:, None, None] * factors[:, None], hi[:, None, None] * factors[:, None]
        row_spec = QuantSpec(spec.bits, spec.scheme)
        best: list[Tensor] = []
        for part in chunks(len(rows), self.memory // (4 * rows.element_size() * rows.shape[1] * self.candidates)):
            q = qparams_from_range(low[part], high[part], row_spec)
            best.append(lp_errors(rows[part, None], q, row_spec, self.p).argmin(dim=1))
        factor = factors[torch.cat(best)]
        return lo * factor, hi * factor


class MagnitudeObserver(Checked):
    """Base of range initializations of QAT: [-reach, reach], or [0, reach] for an unsigned spec; scale = reach / qmax."""

    def __call__(self, x: Float[Tensor, "*shape"], spec: QuantSpec) -> Range:
        hi = self.reach(x, spec).abs().reshape(spec.range_shape(x.shape))
        return (torch.zeros_like(hi) if spec.scheme == "unsigned" else -hi), hi

    def reach(self, x: Float[Tensor, "*shape"], spec: QuantSpec) -> Float[Tensor, "ranges"]:
        """Largest magnitude of every range."""
        raise NotImplementedError


@dataclass(frozen=True)
class LSQInit(MagnitudeObserver):
    """scale = 2 mean|x| / sqrt(qmax): LSQ (arXiv 1902.08153, section 2.1)."""

    def reach(self, x: Float[Tensor, "*shape"], spec: QuantSpec) -> Float[Tensor, "ranges"]:
        return 2 * per_range(x, spec).abs().mean(dim=1) * spec.qmax**0.5


@dataclass(frozen=True)
class AbsMax(MagnitudeObserver):
    """A share of max|x|: 1 in QIL's implementations (c = d = max|x| / 2) and for TDQ's weights, 0.9 for DuQ's weights."""

    share: Annotated[float, POSITIVE_SHARE] = 1.0

    def reach(self, x: Float[Tensor, "*shape"], spec: QuantSpec) -> Float[Tensor, "ranges"]:
        return self.share * per_range(x, spec).abs().amax(dim=1)


@dataclass(frozen=True)
class Percentile(MagnitudeObserver):
    """The magnitude that a share of the values does not exceed, without interpolation; 0.95 for DuQ's activations.

    `positive_only` takes positive values alone, as DuQ's release does; a range without any takes all magnitudes.
    """

    share: Annotated[float, POSITIVE_SHARE] = 0.95
    positive_only: bool = True

    def reach(self, x: Float[Tensor, "*shape"], spec: QuantSpec) -> Float[Tensor, "ranges"]:
        reach: list[Tensor] = []
        for row in per_range(x, spec):
            positive = row[row > 0]
            values = positive if self.positive_only and positive.numel() else row.abs()
            reach.append(values.sort().values[min(int(self.share * values.numel()), values.numel() - 1)])
        return torch.stack(reach)


@dataclass(frozen=True)
class MeanStd(MagnitudeObserver):
    """Mean + k standard deviations of a sample's values, averaged over the batch: TDQ's release.

    k is `deviations`, for an unsigned spec `unsigned_deviations`. `signed_mean` adds the mean with its sign, as the release does,
    where a negative mean shrinks the range.
    """

    deviations: Annotated[float, POSITIVE] = 3.0
    unsigned_deviations: Annotated[float, POSITIVE] = 16.0
    signed_mean: bool = False

    def reach(self, x: Float[Tensor, "batch *rest"], spec: QuantSpec) -> Float[Tensor, "ranges"]:
        rows = x.flatten(1)
        mean, deviation = rows.mean(dim=1).mean(), rows.std(dim=1).mean()
        k = self.unsigned_deviations if spec.scheme == "unsigned" else self.deviations
        return (mean if self.signed_mean else mean.abs()) + k * deviation


@dataclass(frozen=True)
class Constant(MagnitudeObserver):
    """The same range for every tensor: PACT (10) and NIPQ (3, unsigned 6)."""

    signed: Annotated[float, POSITIVE]
    unsigned: Annotated[float, POSITIVE]

    def reach(self, x: Float[Tensor, "*shape"], spec: QuantSpec) -> Float[Tensor, "ranges"]:
        return x.new_full((len(per_range(x, spec)),), self.unsigned if spec.scheme == "unsigned" else self.signed)

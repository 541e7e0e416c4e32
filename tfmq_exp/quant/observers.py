"""Range estimators: from a tensor to the [lo, hi] that its grid should cover.

Every estimator looks at all channels (and all candidates) at once. Each is a small frozen record, called with the tensor
and its spec; lo and hi have the spec's `range_shape` and may be of a wider type than the tensor.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from jaxtyping import Float
from torch import Tensor

from tfmq_exp.core.validate import (
    BYTES,
    COUNT,
    POSITIVE,
    POSITIVE_SHARE,
    POWER,
    SHARE,
    SWITCH,
    Kind,
    check_fields,
    optional,
    whole,
)
from tfmq_exp.quant.functional import fake_quantize, qparams_from_range
from tfmq_exp.quant.spec import QParams, QuantSpec

SEVERAL = Kind("a whole number, at least 2", lambda value: whole(value) and value >= 2)

Range = tuple[Float[Tensor, "*range"], Float[Tensor, "*range"]]


class Observer(Protocol):
    """Anything that maps a tensor to a range."""

    def __call__(self, x: Float[Tensor, "*shape"], spec: QuantSpec) -> Range:
        """Lo and hi with shape `spec.range_shape(x.shape)`."""
        ...


def per_range(x: Float[Tensor, "*shape"], spec: QuantSpec) -> Float[Tensor, "ranges values"]:
    """The tensor as one row per range."""
    return x.reshape(1, -1) if spec.axis is None else x.movedim(spec.axis, 0).flatten(1)


def slices(count: int, size: int) -> list[slice]:
    """0 .. count - 1 in consecutive pieces of at most `size`."""
    return [slice(start, start + size) for start in range(0, count, size)]


def include_zero(lo: Tensor, hi: Tensor) -> Range:
    """Widen a range so that zero is a point of its grid: padding and ReLU need it, and the zero point fits the bits."""
    return lo.clamp(max=0), hi.clamp(min=0)


@dataclass(frozen=True)
class MinMax:
    """The whole range of the values.

    Args:
        widen: include zero in it.
    """

    widen: bool = True

    def __post_init__(self) -> None:
        check_fields(self, widen=SWITCH)

    def __call__(self, x: Float[Tensor, "*shape"], spec: QuantSpec) -> Range:
        """Lo = min(x, 0), hi = max(x, 0); without widening min(x) and max(x)."""
        rows, shape = per_range(x, spec), spec.range_shape(x.shape)
        ends = rows.amin(dim=1).reshape(shape), rows.amax(dim=1).reshape(shape)
        return include_zero(*ends) if self.widen else ends


@dataclass(frozen=True)
class SymmetricMSEObserver:
    """The symmetric threshold whose quantization error has the smallest L_p norm: PTQ4DM's range (arXiv 2211.15736, QDrop's code).

    Thresholds R i / candidates, i = 1 .. candidates, R the largest magnitude, are tried together; ties keep the smallest.
    The range is [-threshold, threshold], and one-sided for a tensor without values on the other side.

    Args:
        values: judge candidates on at most that many values of each range, evenly spaced; None takes all, which for the
            activations of a large batch costs more than everything else in calibration.
        memory: how many bytes the candidates may take at once; they are tried in chunks that fit.
    """

    p: float = 2.4
    candidates: int = 100
    values: int | None = None
    memory: int = 2**28

    def __post_init__(self) -> None:
        check_fields(self, p=POWER, candidates=COUNT, values=optional(COUNT), memory=BYTES)

    def __call__(self, x: Float[Tensor, "*shape"], spec: QuantSpec) -> Range:
        """Lo and hi of the best threshold."""
        rows, shape = per_range(x, spec), spec.range_shape(x.shape)
        lo, hi = rows.amin(dim=1).double(), rows.amax(dim=1).double()
        largest = torch.maximum(lo.abs(), hi.abs())
        if self.values is not None:
            rows = rows[:, :: max(1, rows.shape[1] // self.values)]
        shares = torch.arange(1, self.candidates + 1, dtype=torch.float64, device=x.device) / self.candidates
        row_spec = QuantSpec(spec.bits, spec.scheme)

        def ends(share: Tensor) -> tuple[Tensor, Tensor]:
            reach = largest[:, None] * share
            return -reach * (lo < 0)[:, None], reach * (hi > 0)[:, None]

        at_once = max(1, self.memory // (4 * rows.element_size() * rows.numel()))
        errors = [
            lp_errors(rows[:, None], qparams_from_range(low[..., None], high[..., None], row_spec), row_spec, self.p)
            for low, high in (ends(shares[part]) for part in slices(self.candidates, at_once))
        ]
        low, high = ends(shares[torch.cat(errors, dim=1).argmin(dim=1)][:, None])
        return low.reshape(shape), high.reshape(shape)


def lp_errors(values: Tensor, q: QParams, spec: QuantSpec, p: float) -> Float[Tensor, "ranges candidates"]:
    """Mean p-th power of the quantization error of every candidate; `values` are [ranges, 1, values]."""
    return (fake_quantize(values, q, spec) - values).abs_().pow_(p).mean(dim=2)


@dataclass(frozen=True)
class LpObserver:
    """The shrunken range whose quantization error has the smallest L_p norm (LAPQ, arXiv 1911.07190; p = 2.4 as in BRECQ).

    `candidates` ranges s * [lo, hi] with s = 1, 1 - shrink, 1 - 2 shrink, ... are tried together; ties keep the widest.

    Args:
        widen: include zero in the range before the search, which keeps the zero point inside the grid. The releases of
            Q-Diffusion and TFMQ-DM do not (False): a one-sided tensor then gets a zero point that no engine can store.
        memory: how many bytes the candidates may take at once; they are split into chunks that fit.
    """

    p: float = 2.4
    candidates: int = 80
    shrink: float = 0.01
    widen: bool = True
    memory: int = 2**28

    def __post_init__(self) -> None:
        check_fields(self, p=POWER, candidates=COUNT, shrink=SHARE, widen=SWITCH, memory=BYTES)
        if self.shrink * (self.candidates - 1) >= 1:
            raise ValueError(
                f"{self.candidates} candidates, each smaller by shrink={self.shrink}, must end above 0: "
                f"shrink must be below {1 / (self.candidates - 1):.3g}"
            )

    def __call__(self, x: Float[Tensor, "*shape"], spec: QuantSpec) -> Range:
        """Lo and hi of the best candidate."""
        rows = per_range(x, spec)
        lo, hi = rows.amin(dim=1).double(), rows.amax(dim=1).double()
        if self.widen:
            lo, hi = include_zero(lo, hi)
        factors = 1.0 - self.shrink * torch.arange(self.candidates, dtype=torch.float64, device=x.device)
        low, high = lo[:, None, None] * factors[:, None], hi[:, None, None] * factors[:, None]
        row_spec = QuantSpec(spec.bits, spec.scheme)
        rows_at_once = max(1, self.memory // (4 * rows.element_size() * rows.shape[1] * self.candidates))
        best = torch.cat(
            [
                lp_errors(
                    rows[part, None], qparams_from_range(low[part], high[part], row_spec), row_spec, self.p
                ).argmin(dim=1)
                for part in slices(len(rows), rows_at_once)
            ]
        )
        shape = spec.range_shape(x.shape)
        return (lo * factors[best]).reshape(shape), (hi * factors[best]).reshape(shape)


def bin_edges(lo: Float[Tensor, "*range"], hi: Float[Tensor, "*range"], bins: int) -> Float[Tensor, "*range edges"]:
    """The bins + 1 borders of equal bins from lo to hi; an empty range is widened by a half on both sides."""
    empty = lo == hi
    lo, hi = torch.where(empty, lo - 0.5, lo)[..., None], torch.where(empty, hi + 0.5, hi)[..., None]
    inner = torch.arange(bins, dtype=lo.dtype, device=lo.device) * ((hi - lo) / bins) + lo
    return torch.cat([inner, hi], dim=-1)


def bin_counts(x: Float[Tensor, "*range values"], edges: Float[Tensor, "*range edges"]) -> Float[Tensor, "*range bins"]:
    """How many values fall into each bin. Bins own their left border, the last one both; the rest does not count."""
    inside = (x >= edges[..., :1]) & (x <= edges[..., -1:])
    bins = torch.searchsorted(edges[..., 1:-1].contiguous(), x.contiguous(), right=True)
    counts = torch.zeros((*x.shape[:-1], edges.shape[-1] - 1), dtype=torch.float64, device=x.device)
    return counts.scatter_add_(-1, bins, inside.double())


def density(x: Float[Tensor, "*range values"], edges: Float[Tensor, "*range edges"]) -> Float[Tensor, "*range bins"]:
    """Share of the values in each bin, per unit of its width."""
    return bin_counts(x, edges) / edges.diff().double() / x.shape[-1]


@dataclass(frozen=True)
class EntropyObserver:
    """The shrunken range whose clipped values have the density closest to that of all values: the `kl` of TFMQ-DM.

    `candidates` ranges s * [lo, hi], s from `smallest` to 1, are tried together; ties keep the narrowest. Both
    densities have one bin per level. As in the release, bins are paired by walking both sets from the left, at most
    one bin of the clipped density for each bin of the other, and densities are compared without normalising: the rule
    follows the data only loosely and is here to compare with.

    Args:
        epsilon: added to both densities, so that empty bins have a logarithm.
        memory: how many bytes the candidates may take at once; they are split into chunks that fit.
    """

    candidates: int = 50
    smallest: float = 0.5
    epsilon: float = 1e-5
    memory: int = 2**28

    def __post_init__(self) -> None:
        check_fields(self, candidates=SEVERAL, smallest=POSITIVE_SHARE, epsilon=POSITIVE, memory=BYTES)

    def __call__(self, x: Float[Tensor, "*shape"], spec: QuantSpec) -> Range:
        """The best candidate, widened to include zero."""
        rows, shape = per_range(x, spec).float(), spec.range_shape(x.shape)
        lo, hi = rows.amin(dim=1).double(), rows.amax(dim=1).double()
        ends = torch.tensor([self.smallest, 1.0], dtype=torch.float64, device=x.device)
        factors = bin_edges(ends[0], ends[1], self.candidates - 1)
        rows_at_once = max(1, self.memory // (32 * self.candidates * max(rows.shape[1], spec.levels)))
        best = torch.cat(
            [
                self.divergences(rows[part], factors, spec.levels).argmin(dim=1)
                for part in slices(len(rows), rows_at_once)
            ]
        )
        shrunk = torch.where(lo == hi, 1.0, factors[best])  # equal values have no density
        return include_zero(*((end * shrunk).float().reshape(shape) for end in (lo, hi)))

    def divergences(
        self, rows: Float[Tensor, "ranges values"], factors: Float[Tensor, "candidates"], levels: int
    ) -> Float[Tensor, "ranges candidates"]:
        """Sum of p log(p / q) over the bins, for every candidate."""
        lo, hi = rows.amin(dim=1), rows.amax(dim=1)
        edges = bin_edges(lo, hi, levels)
        p = density(rows, edges)[:, None] + self.epsilon
        bounds = (end.double()[:, None, None] * factors[:, None] for end in (lo, hi))
        clipped = rows.double()[:, None].clamp(*bounds)
        clipped_edges = bin_edges(clipped.amin(dim=2), clipped.amax(dim=2), levels)
        left = edges[:, None, :-1].double().expand(-1, len(factors), -1).contiguous()
        passed = torch.searchsorted(clipped_edges, left, right=True)
        bins = torch.arange(levels, device=rows.device)
        # bin k takes the next bin of the clipped density if that one's left border is not to the right of its own
        used = (bins + (passed - bins).cummin(dim=2).values.clamp(max=1)).clamp(min=0)
        padded = torch.nn.functional.pad(density(clipped, clipped_edges), (1, 1))
        q = padded.gather(2, used) + self.epsilon
        return (p * (p / q).log()).sum(dim=2)


@dataclass(frozen=True)
class HistogramPercentileObserver:
    """The range that clips only the largest magnitudes: the `hist` of TFMQ-DM.

    It ends in the middle of the histogram bin that completes `mass`. The histogram of |x| has one bin per level, from
    0 to the largest magnitude.

    Args:
        mass: share of the values that must lie at or below that bin.
        positive_only: count positive values alone, as the release does, which fails where there are none. A range
            without any then keeps its whole extent.
    """

    mass: float = 0.99999
    positive_only: bool = False

    def __post_init__(self) -> None:
        check_fields(self, mass=POSITIVE_SHARE, positive_only=SWITCH)

    def __call__(self, x: Float[Tensor, "*shape"], spec: QuantSpec) -> Range:
        """Both at most the clipping magnitude, widened to include zero."""
        rows, shape = per_range(x, spec).float(), spec.range_shape(x.shape)
        largest = rows.abs().amax(dim=1)
        edges = bin_edges(torch.zeros_like(largest), largest, spec.levels)
        counts = bin_counts(rows if self.positive_only else rows.abs(), edges)
        total = counts.sum(dim=1)
        last = (counts.cumsum(dim=1) < self.mass * total[:, None]).sum(dim=1)
        clip = torch.where(total > 0, (last + 0.5) * (largest.double() / spec.levels), largest.double())
        lo = torch.maximum(rows.amin(dim=1).double(), -clip)
        hi = torch.minimum(rows.amax(dim=1).double(), clip)
        return include_zero(lo.float().reshape(shape), hi.float().reshape(shape))

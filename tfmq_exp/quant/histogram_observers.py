"""Observers that look at histograms: the `kl` and `hist` of TFMQ-DM's release."""

from dataclasses import dataclass
from typing import Annotated

import torch
from jaxtyping import Float
from torch import Tensor

from tfmq_exp.core.validate import BYTES, POSITIVE, POSITIVE_SHARE, Kind, whole
from tfmq_exp.quant.observers import Range, RowObserver, chunks, include_zero, row_ends
from tfmq_exp.quant.spec import QuantSpec

SEVERAL = Kind("a whole number, at least 2", lambda value: whole(value) and value >= 2)


def bin_edges(lo: Float[Tensor, "*range"], hi: Float[Tensor, "*range"], bins: int) -> Float[Tensor, "*range edges"]:
    """The bins + 1 borders of equal bins from lo to hi; an empty range is widened by a half on both sides."""
    empty = lo == hi
    lo, hi = torch.where(empty, lo - 0.5, lo)[..., None], torch.where(empty, hi + 0.5, hi)[..., None]
    inner = torch.arange(bins, dtype=lo.dtype, device=lo.device) * ((hi - lo) / bins) + lo
    return torch.cat([inner, hi], dim=-1)


def bin_counts(x: Float[Tensor, "*range values"], edges: Float[Tensor, "*range edges"]) -> Float[Tensor, "*range bins"]:
    """Values in each bin. Bins own their left border, the last one both; values outside do not count."""
    inside = (x >= edges[..., :1]) & (x <= edges[..., -1:])
    bins = torch.searchsorted(edges[..., 1:-1].contiguous(), x.contiguous(), right=True)
    counts = torch.zeros((*x.shape[:-1], edges.shape[-1] - 1), dtype=torch.float64, device=x.device)
    return counts.scatter_add_(-1, bins, inside.double())


def density(x: Float[Tensor, "*range values"], edges: Float[Tensor, "*range edges"]) -> Float[Tensor, "*range bins"]:
    """Share of the values in each bin, per unit of its width."""
    return bin_counts(x, edges) / edges.diff().double() / x.shape[-1]


@dataclass(frozen=True)
class EntropyObserver(RowObserver):
    """The shrunken range whose clipped values have the density closest to that of all values: the `kl` of TFMQ-DM.

    `candidates` ranges s * [lo, hi], s from `smallest` to 1, are tried together; ties keep the narrowest. Both
    densities have one bin per level. As in the release, bins are paired by walking both sets from the left, at most
    one bin of the clipped density for each bin of the other, and densities are compared without normalising: the rule
    follows the data only loosely and is here to compare with.

    Args:
        candidates: how many ranges.
        smallest: share of the range that the narrowest one has.
        epsilon: added to both densities, so that empty bins have a logarithm.
        memory: bytes that the candidates may take at once.
    """

    candidates: Annotated[int, SEVERAL] = 50
    smallest: Annotated[float, POSITIVE_SHARE] = 0.5
    epsilon: Annotated[float, POSITIVE] = 1e-5
    memory: Annotated[int, BYTES] = 2**28

    def ends(self, rows: Float[Tensor, "ranges values"], spec: QuantSpec) -> Range:
        rows = rows.float()
        lo, hi = row_ends(rows)
        ends = torch.tensor([self.smallest, 1.0], dtype=torch.float64, device=rows.device)
        factors = bin_edges(ends[0], ends[1], self.candidates - 1)
        parts = chunks(len(rows), self.memory // (32 * self.candidates * max(rows.shape[1], spec.levels)))
        best = torch.cat([self.divergences(rows[part], factors, spec.levels).argmin(dim=1) for part in parts])
        # equal values have no density
        shrunk = torch.where(lo == hi, 1.0, factors[best])
        return include_zero((lo * shrunk).float(), (hi * shrunk).float())

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
class HistogramPercentileObserver(RowObserver):
    """The range that clips only the largest magnitudes: the `hist` of TFMQ-DM.

    It ends in the middle of the bin at or below which a share `mass` of the values lies. The histogram of |x| has one bin per
    level, from 0 to the largest magnitude. `positive_only` counts positive values alone, as the release does, which fails where
    there are none; a range without any then keeps its whole extent.
    """

    mass: Annotated[float, POSITIVE_SHARE] = 0.99999
    positive_only: bool = False

    def ends(self, rows: Float[Tensor, "ranges values"], spec: QuantSpec) -> Range:
        rows = rows.float()
        largest, (lo, hi) = rows.abs().amax(dim=1), row_ends(rows)
        edges = bin_edges(torch.zeros_like(largest), largest, spec.levels)
        counts = bin_counts(rows if self.positive_only else rows.abs(), edges)
        total = counts.sum(dim=1)
        last = (counts.cumsum(dim=1) < self.mass * total[:, None]).sum(dim=1)
        clip = torch.where(total > 0, (last + 0.5) * (largest.double() / spec.levels), largest.double())
        lo, hi = torch.maximum(lo, -clip), torch.minimum(hi, clip)
        return include_zero(lo.float(), hi.float())

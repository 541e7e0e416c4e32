"""Range initialization of quantization-aware training: the observers of its papers and releases.

All give ranges that are symmetric about zero, or start at zero for an unsigned spec; scale = max / qmax.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from tfmq_exp.core.validate import POSITIVE, POSITIVE_SHARE, SWITCH, check_fields
from tfmq_exp.quant.observers import Observer, Range, per_range
from tfmq_exp.quant.qat.base import IntRangeKind, range_ratio
from tfmq_exp.quant.spec import QuantSpec


def as_range(reach: Float[Tensor, "ranges"], x: Tensor, spec: QuantSpec) -> Range:
    """[-reach, reach], or [0, reach], with the spec's `range_shape`."""
    hi = reach.abs().reshape(spec.range_shape(x.shape))
    return (torch.zeros_like(hi) if spec.scheme == "unsigned" else -hi), hi


@dataclass(frozen=True)
class LSQInit:
    """scale = 2 mean|x| / sqrt(qmax): LSQ (arXiv 1902.08153, section 2.1)."""

    def __call__(self, x: Float[Tensor, "*shape"], spec: QuantSpec) -> Range:
        return as_range(2 * per_range(x, spec).abs().mean(dim=1) * spec.qmax**0.5, x, spec)


@dataclass(frozen=True)
class AbsMax:
    """A share of max|x|: 1 in QIL's implementations (c = d = max|x| / 2) and for TDQ's weights, 0.9 for DuQ's weights."""

    share: float = 1.0

    def __post_init__(self) -> None:
        check_fields(self, share=POSITIVE_SHARE)

    def __call__(self, x: Float[Tensor, "*shape"], spec: QuantSpec) -> Range:
        return as_range(self.share * per_range(x, spec).abs().amax(dim=1), x, spec)


@dataclass(frozen=True)
class Percentile:
    """The magnitude that a share of the values does not exceed, without interpolation.

    Args:
        share: 0.95 for DuQ's activations.
        positive_only: take positive values alone, as DuQ's release does; a range without any takes all magnitudes.
    """

    share: float = 0.95
    positive_only: bool = True

    def __post_init__(self) -> None:
        check_fields(self, share=POSITIVE_SHARE, positive_only=SWITCH)

    def __call__(self, x: Float[Tensor, "*shape"], spec: QuantSpec) -> Range:
        reach: list[Tensor] = []
        for row in per_range(x, spec):
            positive = row[row > 0]
            values = positive if self.positive_only and positive.numel() else row.abs()
            reach.append(values.sort().values[min(int(self.share * values.numel()), values.numel() - 1)])
        return as_range(torch.stack(reach), x, spec)


@dataclass(frozen=True)
class MeanStd:
    """Mean + k standard deviations of a sample's values, averaged over the batch: TDQ's release.

    Args:
        deviations: k for a symmetric spec.
        unsigned_deviations: k for an unsigned spec.
        signed_mean: add the mean with its sign, as the release does, where a negative mean shrinks the range.
    """

    deviations: float = 3.0
    unsigned_deviations: float = 16.0
    signed_mean: bool = False

    def __post_init__(self) -> None:
        check_fields(self, deviations=POSITIVE, unsigned_deviations=POSITIVE, signed_mean=SWITCH)

    def __call__(self, x: Float[Tensor, "batch *rest"], spec: QuantSpec) -> Range:
        rows = x.flatten(1)
        mean, deviation = rows.mean(dim=1).mean(), rows.std(dim=1).mean()
        k = self.unsigned_deviations if spec.scheme == "unsigned" else self.deviations
        return as_range(((mean if self.signed_mean else mean.abs()) + k * deviation).reshape(1), x, spec)


@dataclass(frozen=True)
class Constant:
    """The same range for every tensor: PACT (10) and NIPQ (3, unsigned 6)."""

    signed: float
    unsigned: float

    def __post_init__(self) -> None:
        check_fields(self, signed=POSITIVE, unsigned=POSITIVE)

    def __call__(self, x: Float[Tensor, "*shape"], spec: QuantSpec) -> Range:
        reach = self.unsigned if spec.scheme == "unsigned" else self.signed
        return as_range(torch.full((len(per_range(x, spec)),), reach, dtype=x.dtype, device=x.device), x, spec)


@dataclass(frozen=True)
class ScaledToIntRange:
    """An observer's range, widened so that its maximum falls on the largest used code, where that is not the largest of the spec."""

    observer: Observer
    int_range: IntRangeKind

    def __call__(self, x: Float[Tensor, "*shape"], spec: QuantSpec) -> Range:
        lo, hi = self.observer(x, spec)
        ratio = range_ratio(spec, self.int_range)
        return lo * ratio, hi * ratio

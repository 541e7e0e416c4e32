"""Where trained ranges start: range estimators of the papers and releases of quantization-aware training.

All give ranges that are symmetric about zero, or start at zero on an unsigned grid; the step is the range over the largest code.
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
    """s = 2 mean|x| / sqrt(largest code): LSQ (arXiv 1902.08153, section 2.1)."""

    def __call__(self, x: Float[Tensor, "*shape"], spec: QuantSpec) -> Range:
        """The range of such steps."""
        return as_range(2 * per_range(x, spec).abs().mean(dim=1) * spec.qmax**0.5, x, spec)


@dataclass(frozen=True)
class AbsMax:
    """A share of max|x|: 1 in QIL's implementations (c = d = max|x| / 2) and TDQ's weights, 0.9 for DuQ's weights."""

    share: float = 1.0

    def __post_init__(self) -> None:
        check_fields(self, share=POSITIVE_SHARE)

    def __call__(self, x: Float[Tensor, "*shape"], spec: QuantSpec) -> Range:
        """The share of the largest magnitude."""
        return as_range(self.share * per_range(x, spec).abs().amax(dim=1), x, spec)


@dataclass(frozen=True)
class Percentile:
    """The magnitude that a share of the values does not exceed.

    Args:
        share: 0.95 for DuQ's activations.
        positive_only: look at positive values alone, as DuQ's release does; a range without any takes all magnitudes.
    """

    share: float = 0.95
    positive_only: bool = True

    def __post_init__(self) -> None:
        check_fields(self, share=POSITIVE_SHARE, positive_only=SWITCH)

    def __call__(self, x: Float[Tensor, "*shape"], spec: QuantSpec) -> Range:
        """One percentile per range; the value at or above it, without interpolation."""
        reach: list[Tensor] = []
        for row in per_range(x, spec):
            positive = row[row > 0]
            seen = positive if self.positive_only and positive.numel() else row.abs()
            reach.append(seen.sort().values[min(int(self.share * seen.numel()), seen.numel() - 1)])
        return as_range(torch.stack(reach), x, spec)


@dataclass(frozen=True)
class MeanStd:
    """Mean + k standard deviations, each of one sample's values and averaged over the batch: TDQ's release.

    Args:
        deviations: k on a symmetric grid.
        unsigned_deviations: k on an unsigned grid.
        signed_mean: add the mean with its sign, as the release does, where a negative mean shrinks the range.
    """

    deviations: float = 3.0
    unsigned_deviations: float = 16.0
    signed_mean: bool = False

    def __post_init__(self) -> None:
        check_fields(self, deviations=POSITIVE, unsigned_deviations=POSITIVE, signed_mean=SWITCH)

    def __call__(self, x: Float[Tensor, "batch *rest"], spec: QuantSpec) -> Range:
        """One range for the batch."""
        rows = x.flatten(1)
        mean, deviation = rows.mean(dim=1).mean(), rows.std(dim=1).mean()
        k = self.unsigned_deviations if spec.scheme == "unsigned" else self.deviations
        reach = (mean if self.signed_mean else mean.abs()) + k * deviation
        return as_range(reach.reshape(1), x, spec)


@dataclass(frozen=True)
class Constant:
    """The same range for everything: PACT (10) and NIPQ (3, unsigned 6)."""

    signed: float
    unsigned: float

    def __post_init__(self) -> None:
        check_fields(self, signed=POSITIVE, unsigned=POSITIVE)

    def __call__(self, x: Float[Tensor, "*shape"], spec: QuantSpec) -> Range:
        """Whatever x is."""
        reach = self.unsigned if spec.scheme == "unsigned" else self.signed
        return as_range(torch.full((len(per_range(x, spec)),), reach, dtype=x.dtype, device=x.device), x, spec)


@dataclass(frozen=True)
class ScaledToIntRange:
    """An estimator's range, widened for a grid whose largest code is not used.

    A source's step is its range over the largest code of the whole grid; widened, this step times the largest code that is used
    is the estimator's range.
    """

    of: Observer
    levels: IntRangeKind

    def __call__(self, x: Float[Tensor, "*shape"], spec: QuantSpec) -> Range:
        """Both ends times one ratio."""
        lo, hi = self.of(x, spec)
        ratio = range_ratio(spec, self.levels)
        return lo * ratio, hi * ratio

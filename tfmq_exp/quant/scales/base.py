"""Scale providers: the scale and zero point of an activation, and their configurations."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Self

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from tfmq_exp.core.finite import require_finite
from tfmq_exp.core.validate import DECAY, check_fields
from tfmq_exp.quant.functional import SMALLEST_SCALE, qparams_from_range
from tfmq_exp.quant.observers import MinMax, Observer, ScaledToIntRange, include_zero
from tfmq_exp.quant.spec import IntRangeKind, QParams, QuantSpec
from tfmq_exp.quant.timestep_context import TimestepContext

DEFAULT_OBSERVER = MinMax(include_zero=False)  # the running range is widened to zero, not each batch's


class ScaleProvider(nn.Module):
    """Gives the scale and zero point for a tensor whose first dimension is the batch."""

    spec: QuantSpec
    needs_data: bool = True  # whether it has to `observe` calibration data
    per_step: bool = False  # whether every range belongs to one sampling step
    generates: bool = False  # whether `trainable` is a network, and not the scales themselves

    def observe(self, x: Float[Tensor, "batch *rest"]) -> None:
        """Take statistics from a calibration batch."""

    def forward(self, x: Float[Tensor, "batch *rest"]) -> QParams:
        """The parameters to quantize `x` with, broadcastable against it."""
        raise NotImplementedError

    def step_table(self, steps: int) -> QParams | None:
        """Scale and zero point of every sampling step, shape [steps]; None where they depend on the tensor."""
        return None

    def uncalibrated(self) -> list[int]:
        """Entries that have had no data and cannot quantize."""
        return []

    def trainable(self) -> Iterator[nn.Parameter]:
        """Parameters that a method may learn."""
        return iter(())

    def clamp_parameters(self) -> None:
        """Called after every step of an optimiser on `trainable`."""

    def tabulated(self) -> "ScaleProvider":
        """An equal provider for sampling: what can be computed beforehand is a table."""
        return self


@dataclass(frozen=True)
class ScaleConfig(ABC):
    """Configuration of a scale provider. Kinds that a stored model may have after learning have a `kind`, their name in files."""

    @abstractmethod
    def build(self, spec: QuantSpec, context: TimestepContext) -> ScaleProvider:
        """A provider for one quantizer."""

    @abstractmethod
    def tabulated(self) -> "ScaleConfig":
        """The configuration of `ScaleProvider.tabulated`, without settings of calibration and learning."""

    def seeded_for(self, name: str) -> Self:
        """A copy seeded from an activation's name (only generated scales use random numbers)."""
        return self

    def for_qat(self, init: Observer, kind: IntRangeKind) -> Self:
        """A copy for a QAT quantizer with this integer range, whose ranges are initialized by an observer."""
        return self


@dataclass(frozen=True, kw_only=True)
class EMAConfig(ScaleConfig):
    """Scales from ranges that are exponential moving averages.

    Args:
        momentum: weight of the past; 0.95 in Q-Diffusion and TFMQ-DM.
        observer: of the range of one batch.
    """

    momentum: float = 0.95
    observer: Observer = DEFAULT_OBSERVER

    def __post_init__(self) -> None:
        check_fields(self, momentum=DECAY)

    def tabulated(self) -> ScaleConfig:
        return type(self)()

    def for_qat(self, init: Observer, kind: IntRangeKind) -> Self:
        return replace(self, observer=ScaledToIntRange(init, kind))


class EMARange(ScaleProvider):
    """A table of ranges, each an exponential moving average over the batches that it has seen (arXiv 1712.05877, 3.1).

    The first batch sets a range, later ones move it: lo <- momentum * lo + (1 - momentum) * lo of the batch. Scales follow
    at once; only they are part of the state that is saved, and only they can be learned: zero points stay what
    calibration made them. NaN marks an entry without data.

    Args:
        config: of the average.
        spec: of the integers.
        entries: number of ranges.
    """

    lo: Tensor
    hi: Tensor
    zero_point: Tensor

    def __init__(self, config: EMAConfig, spec: QuantSpec, entries: int = 1) -> None:
        super().__init__()
        if spec.axis is not None:
            raise ValueError("activations have one range per tensor: spec.axis must be None")
        self.config, self.spec = config, spec
        for name in ("lo", "hi", "zero_point"):
            self.register_buffer(name, torch.full((entries,), torch.nan), persistent=name == "zero_point")
        self.scale = nn.Parameter(torch.full((entries,), torch.nan), requires_grad=False)

    def update_range(self, x: Float[Tensor, "batch *rest"], entry_of_row: Int[Tensor, "batch"]) -> None:
        """Move the ranges of the entries that the rows belong to.

        Raises:
            NotFiniteError: values, or the range that the observer finds, are NaN or infinite, which is no range; a moving
                average would keep it for good.
        """
        lo, hi = torch.full_like(self.lo, torch.inf), torch.full_like(self.hi, torch.inf)
        for entry in sorted({int(i) for i in entry_of_row}):
            rows = x[entry_of_row == entry]
            ends = [end.reshape(()).double() for end in self.config.observer(rows, self.spec)]
            # the extremes too: some observers look at a part of the values
            extremes = [end.double() for end in rows.aminmax()]
            require_finite(torch.stack([*ends, *extremes]), "the range of an activation")
            lo[entry], hi[entry] = ends
        self.update(lo, hi)

    @torch.no_grad()
    def update(self, lo: Float[Tensor, "entries"], hi: Float[Tensor, "entries"]) -> None:
        """Move the ranges towards those of a batch; entries that are infinite had no data in it."""
        here, momentum = torch.isfinite(lo), self.config.momentum
        for running, batch in ((self.lo, lo), (self.hi, hi)):
            moved = momentum * running + (1 - momentum) * batch
            running.copy_(torch.where(here, torch.where(running.isnan(), batch, moved), running))
        scale, zero_point = qparams_from_range(*include_zero(self.lo, self.hi), self.spec)
        self.scale.copy_(scale)
        self.zero_point.copy_(zero_point)

    def uncalibrated(self) -> list[int]:
        return [int(i) for i in torch.nonzero(self.scale.isnan())]

    def trainable(self) -> Iterator[nn.Parameter]:
        yield self.scale

    @torch.no_grad()
    def clamp_parameters(self) -> None:
        """Keep scales positive: a negative one would turn the integers around."""
        self.scale.clamp_(min=SMALLEST_SCALE)

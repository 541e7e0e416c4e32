"""Scales from running ranges: one for all timesteps, one for each of the sampler's, or one for each group of timesteps."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar, Self

import torch
from jaxtyping import Float
from torch import Tensor, nn

from tfmq_exp.core.finite import require_finite
from tfmq_exp.core.validate import COUNT, DECAY, WrongValueError
from tfmq_exp.quant.functional import SMALLEST_SCALE, qparams_from_range
from tfmq_exp.quant.observers import MinMax, Observer, include_zero
from tfmq_exp.quant.scales.base import ScaleConfig, ScaleProvider, per_row
from tfmq_exp.quant.spec import IntRangeKind, QParams, QuantSpec, range_ratio
from tfmq_exp.quant.timestep_context import TimestepContext

DEFAULT_OBSERVER = MinMax(include_zero=False)  # the running range is widened to zero, not each batch's


@dataclass(frozen=True, kw_only=True)
class EMAConfig(ScaleConfig):
    """Scales from ranges, one `observer`'s for each batch, that are exponential moving averages.

    `momentum` is the weight of the past; 0.95 in Q-Diffusion and TFMQ-DM.
    """

    per_step: ClassVar[bool] = False
    momentum: Annotated[float, DECAY] = 0.95
    observer: Observer = DEFAULT_OBSERVER

    def build(self, spec: QuantSpec, context: TimestepContext) -> ScaleProvider:
        return EMARange(self, spec, context)

    def range_of_step(self, timesteps: Sequence[float]) -> Sequence[int] | None:
        """Number of the range that each sampling step reads, from 0 without gaps; None: all steps read the only one."""
        return None

    def tabulated(self) -> ScaleConfig:
        return type(self)()

    def for_qat(self, init: Observer, kind: IntRangeKind) -> Self:
        return replace(self, observer=init, int_range=kind)


@dataclass(frozen=True)
class StaticConfig(EMAConfig):
    """One range for all timesteps."""

    kind: ClassVar[str] = "static"


@dataclass(frozen=True)
class PerStepConfig(EMAConfig):
    """Finite Set Calibration (FSC): one range for each of the sampler's timesteps (TFMQ-DM, arXiv 2311.16503, section 4.3).

    A temporal feature takes one value per step, so its range is exact after one batch. Those of other activations move.
    """

    kind: ClassVar[str] = "per_step"
    per_step: ClassVar[bool] = True

    def range_of_step(self, timesteps: Sequence[float]) -> Sequence[int]:
        return range(len(timesteps))


@dataclass(frozen=True)
class TimestepGroupConfig(EMAConfig):
    """S_N: N ranges, each for an equal part of the training timesteps (TDQ, arXiv 2306.02316, supplement, section 5).

    Timestep t reads range floor(t N / T), N = `count`, T = `train_timesteps` of the schedule that the network was trained on;
    N = 1 is one static range. Groups without a step have no range.
    """

    kind: ClassVar[str] = "timestep_groups"
    count: Annotated[int, COUNT]
    train_timesteps: Annotated[int, COUNT]

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.count > self.train_timesteps:
            at_most = f"at most train_timesteps, {self.train_timesteps}"
            raise WrongValueError(type(self).__name__, "count", at_most, self.count)

    def range_of_step(self, timesteps: Sequence[float]) -> Sequence[int]:
        lowest, highest, last = min(timesteps), max(timesteps), self.train_timesteps
        real = any(isinstance(t, float) for t in timesteps)
        if real and self.count > 1 and (lowest < 0 or highest * self.count < last):
            raise ValueError(
                f"intervals are parts of the training timesteps 0 .. {last}, and this network counts otherwise: it is given "
                f"{lowest:.4g} .. {highest:.4g}; take one scale for each step (method/scales=finite_set)"
            )
        groups = [min(int(t * self.count // last), self.count - 1) for t in timesteps]
        used = sorted(set(groups))
        return [used.index(group) for group in groups]

    def tabulated(self) -> ScaleConfig:
        return TimestepGroupConfig(self.count, self.train_timesteps)


class EMARange(ScaleProvider):
    """A table of ranges, each an exponential moving average over the batches that it has seen (arXiv 1712.05877, 3.1).

    The first batch sets a range, later ones move it: lo <- momentum * lo + (1 - momentum) * lo of the batch. Scales follow
    at once; only they are part of the state that is saved, and only they can be learned: zero points stay what
    calibration made them. NaN marks an entry without data.
    """

    lo: Tensor
    hi: Tensor
    zero_point: Tensor
    range_of_step: Tensor | None

    def __init__(self, config: EMAConfig, spec: QuantSpec, context: TimestepContext | None = None) -> None:
        super().__init__()
        if spec.axis is not None:
            raise ValueError("activations have one range per tensor: spec.axis must be None")
        self.config, self.spec, self.per_step = config, spec, config.per_step
        self.context: Any = context
        self.ratio = range_ratio(spec, config.int_range)
        read = config.range_of_step(context.timesteps) if context else None
        entries = 1 if read is None else max(read) + 1
        self.register_buffer("range_of_step", None if read is None else torch.tensor(read), persistent=False)
        for name in ("lo", "hi", "zero_point"):
            self.register_buffer(name, torch.full((entries,), torch.nan), persistent=name == "zero_point")
        self.scale = nn.Parameter(torch.full((entries,), torch.nan), requires_grad=False)

    def observe(self, x: Float[Tensor, "batch *rest"]) -> None:
        """Move the ranges that the rows read; NotFiniteError for NaN or infinity, which an average would keep for good."""
        lo, hi = torch.full_like(self.lo, torch.inf), torch.full_like(self.hi, torch.inf)
        table = self.range_of_step
        read = torch.zeros(len(x), dtype=torch.long) if table is None else table[self.context.steps_of(x)]
        for entry in sorted({int(i) for i in read.cpu()}):
            rows = x[read.to(x.device) == entry]
            ends = [(end * self.ratio).reshape(()).double() for end in self.config.observer(rows, self.spec)]
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

    def forward(self, x: Float[Tensor, "batch *rest"]) -> QParams:
        """A pair per row, shape [batch, 1, ...]; one pair, shape [1], where all steps read the only range."""
        if self.range_of_step is None:
            return QParams(self.scale, self.zero_point)
        entries = self.range_of_step[self.context.steps_of(x)]
        return QParams(per_row(self.scale[entries], x), per_row(self.zero_point[entries], x))

    def table(self) -> QParams | None:
        entries = [0] * self.context.num_steps if self.range_of_step is None else self.range_of_step
        return QParams(self.scale[entries], self.zero_point[entries])

    def uncalibrated(self) -> list[int]:
        return [int(i) for i in torch.nonzero(self.scale.isnan())]

    def trainable(self) -> Iterator[nn.Parameter]:
        yield self.scale

    @torch.no_grad()
    def clamp_parameters(self) -> None:
        """Keep scales positive: a negative one would turn the integers around."""
        self.scale.clamp_(min=SMALLEST_SCALE)

"""Where activation scales come from: records of choices, each of which makes one source."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from tfmq_exp.denoisers.anatomy import TEMPORAL_ROLES, Role
from tfmq_exp.quant.clock import StepClock
from tfmq_exp.quant.encodings import TimeEncoding
from tfmq_exp.quant.ranges import RangeEstimator
from tfmq_exp.quant.sources.base import DEFAULT_ESTIMATOR, Source
from tfmq_exp.quant.sources.dynamic import Dynamic
from tfmq_exp.quant.sources.generated import Generated, LastLayer
from tfmq_exp.quant.sources.intervals import Intervals
from tfmq_exp.quant.sources.per_step import PerStep
from tfmq_exp.quant.sources.static import Static
from tfmq_exp.quant.spec import QuantSpec


class Scale(Protocol):
    """A way of finding the scale of an activation."""

    def source(self, spec: QuantSpec, clock: StepClock) -> Source:
        """A source of its own for one quantizer."""
        ...

    def merged(self) -> "Scale":
        """What is left of it once calibration and learning are over."""
        ...


@dataclass(frozen=True)
class StaticScale:
    """One for all timesteps: `Static`."""

    momentum: float = 0.95
    estimator: RangeEstimator = DEFAULT_ESTIMATOR

    def source(self, spec: QuantSpec, clock: StepClock) -> Source:
        """`Static`."""
        return Static(spec, momentum=self.momentum, estimator=self.estimator)

    def merged(self) -> Scale:
        """A number."""
        return StaticScale(0.0)


@dataclass(frozen=True)
class PerStepScale:
    """One for each sampling step, Finite Set Calibration: `PerStep`."""

    momentum: float = 0.95
    estimator: RangeEstimator = DEFAULT_ESTIMATOR

    def source(self, spec: QuantSpec, clock: StepClock) -> Source:
        """`PerStep`."""
        return PerStep(spec, clock, momentum=self.momentum, estimator=self.estimator)

    def merged(self) -> Scale:
        """A table."""
        return PerStepScale(0.0)


@dataclass(frozen=True)
class IntervalScale:
    """One for each of `count` equal parts of the training timesteps, S_N: `Intervals`."""

    count: int
    train_timesteps: int
    momentum: float = 0.95
    estimator: RangeEstimator = DEFAULT_ESTIMATOR

    def source(self, spec: QuantSpec, clock: StepClock) -> Source:
        """`Intervals`."""
        return Intervals(
            spec,
            clock,
            count=self.count,
            train_timesteps=self.train_timesteps,
            momentum=self.momentum,
            estimator=self.estimator,
        )

    def merged(self) -> Scale:
        """A table of its entries."""
        return IntervalScale(self.count, self.train_timesteps, 0.0)


@dataclass(frozen=True)
class DynamicScale:
    """That of the tensor at hand: `Dynamic`."""

    per: Literal["tensor", "sample"]

    def source(self, spec: QuantSpec, clock: StepClock) -> Source:
        """`Dynamic`."""
        return Dynamic(spec, self.per)

    def merged(self) -> Scale:
        """Nothing can be computed beforehand."""
        return self


@dataclass(frozen=True)
class GeneratedScale:
    """A small network's function of the timestep, TDQ: `Generated`."""

    encoding: TimeEncoding
    hidden: tuple[int, ...]
    dropout: float
    last: LastLayer
    seed: int = 0
    momentum: float = 0.95
    estimator: RangeEstimator = DEFAULT_ESTIMATOR

    def source(self, spec: QuantSpec, clock: StepClock) -> Source:
        """`Generated`."""
        return Generated(
            spec,
            clock,
            encoding=self.encoding,
            hidden=self.hidden,
            dropout=self.dropout,
            last=self.last,
            seed=self.seed,
            momentum=self.momentum,
            estimator=self.estimator,
        )

    def merged(self) -> Scale:
        """The network's values on the finite set."""
        return PerStepScale(0.0)


@dataclass(frozen=True)
class ScalePlan:
    """Scales of the Temporal Information Block's activations, and of all others."""

    temporal: Scale
    rest: Scale

    def __post_init__(self) -> None:
        for scale in (self.temporal, self.rest):
            scale_to_json(scale.merged())  # what could not be stored is refused before anything is computed

    def of(self, role: Role | None) -> Scale:
        """That of a layer with this role (None: attention's operands)."""
        return self.temporal if role in TEMPORAL_ROLES else self.rest


KINDS: Mapping[str, type[Any]] = {
    "static": StaticScale,
    "per_step": PerStepScale,
    "intervals": IntervalScale,
    "dynamic": DynamicScale,
}


def scale_to_json(scale: Scale) -> dict[str, Any]:
    """What a stored model needs to know of a merged scale.

    Raises:
        TypeError: a kind that cannot be stored.
    """
    for kind, cls in KINDS.items():
        if isinstance(scale, cls):
            fields = {"intervals": ("count", "train_timesteps"), "dynamic": ("per",)}.get(kind, ())
            return {"kind": kind, **{name: getattr(scale, name) for name in fields}}
    kinds = ", ".join(cls.__name__ for cls in KINDS.values())
    raise TypeError(f"a {type(scale).__name__} must be merged before it is stored: into one of {kinds}")


def scale_from_json(data: Mapping[str, Any]) -> Scale:
    """The inverse of `scale_to_json`; ValueError for an unknown kind."""
    if data["kind"] not in KINDS:
        raise ValueError(f"unknown kind of scale {data['kind']!r}; known: {', '.join(KINDS)}")
    return KINDS[data["kind"]](**{name: value for name, value in data.items() if name != "kind"}).merged()

"""Where activation scales come from: records of choices, each of which makes one source."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol

from tfmq_exp.core.seeds import derive_seed
from tfmq_exp.core.validate import COUNT, DECAY, SEED, WrongValueError, check_fields, sequence_of
from tfmq_exp.denoisers.structure import TEMPORAL_ROLES, Role
from tfmq_exp.quant.observers import Observer
from tfmq_exp.quant.qat.base import IntRangeKind, QATQuantizeFn
from tfmq_exp.quant.qat.serialization import form_from_json, form_to_json
from tfmq_exp.quant.quantizers.affine import AffineQuantizer
from tfmq_exp.quant.quantizers.trainable import Centre, TrainableQuantizer, checked_centre
from tfmq_exp.quant.scales.base import DEFAULT_OBSERVER, Source
from tfmq_exp.quant.scales.dynamic import Dynamic
from tfmq_exp.quant.scales.dynamic_generator import FromStatistics
from tfmq_exp.quant.scales.per_step import PerStep
from tfmq_exp.quant.scales.static import Static
from tfmq_exp.quant.scales.tdq import Generated, LastLayer
from tfmq_exp.quant.scales.timestep_groups import Intervals
from tfmq_exp.quant.spec import QuantSpec
from tfmq_exp.quant.timestep_context import TimestepContext
from tfmq_exp.quant.timestep_encoding import TimeEncoding, encoding_from_json, encoding_to_json


class Scale(Protocol):
    """A way of finding the scale of an activation."""

    def source(self, spec: QuantSpec, context: TimestepContext) -> Source:
        """A source of its own for one quantizer."""
        ...

    def quantizer(self, spec: QuantSpec, context: TimestepContext) -> AffineQuantizer:
        """A quantizer with such a source."""
        return AffineQuantizer(self.source(spec, context))

    def merged(self) -> "Scale":
        """What is left of it once calibration and learning are over."""
        ...

    def seeded_for(self, name: str) -> "Scale":
        """The same for the activation of this name, which draws random numbers of its own where any are drawn."""
        return self


@dataclass(frozen=True)
class StaticScale(Scale):
    """One for all timesteps: `Static`."""

    momentum: float = 0.95
    estimator: Observer = DEFAULT_OBSERVER

    def __post_init__(self) -> None:
        check_fields(self, momentum=DECAY)

    def source(self, spec: QuantSpec, context: TimestepContext) -> Source:
        """`Static`."""
        return Static(spec, momentum=self.momentum, estimator=self.estimator)

    def merged(self) -> Scale:
        """A number."""
        return StaticScale(0.0)


@dataclass(frozen=True)
class PerStepScale(Scale):
    """One for each sampling step, Finite Set Calibration: `PerStep`."""

    momentum: float = 0.95
    estimator: Observer = DEFAULT_OBSERVER

    def __post_init__(self) -> None:
        check_fields(self, momentum=DECAY)

    def source(self, spec: QuantSpec, context: TimestepContext) -> Source:
        """`PerStep`."""
        return PerStep(spec, context, momentum=self.momentum, estimator=self.estimator)

    def merged(self) -> Scale:
        """A table."""
        return PerStepScale(0.0)


@dataclass(frozen=True)
class IntervalScale(Scale):
    """One for each of `count` equal parts of the training timesteps, S_N: `Intervals`."""

    count: int
    train_timesteps: int
    momentum: float = 0.95
    estimator: Observer = DEFAULT_OBSERVER

    def __post_init__(self) -> None:
        check_fields(self, count=COUNT, train_timesteps=COUNT, momentum=DECAY)
        if self.count > self.train_timesteps:
            right = f"at most train_timesteps, {self.train_timesteps}"
            raise WrongValueError(type(self).__name__, "count", right, self.count)

    def source(self, spec: QuantSpec, context: TimestepContext) -> Source:
        """`Intervals`."""
        return Intervals(
            spec,
            context,
            count=self.count,
            train_timesteps=self.train_timesteps,
            momentum=self.momentum,
            estimator=self.estimator,
        )

    def merged(self) -> Scale:
        """A table of its entries."""
        return IntervalScale(self.count, self.train_timesteps, 0.0)


@dataclass(frozen=True)
class DynamicScale(Scale):
    """That of the tensor at hand: `Dynamic`."""

    per: Literal["tensor", "sample"]
    levels: IntRangeKind = "full"

    def source(self, spec: QuantSpec, context: TimestepContext) -> Source:
        """`Dynamic`."""
        return Dynamic(spec, self.per, self.levels)

    def merged(self) -> Scale:
        """Nothing can be computed beforehand."""
        return self


@dataclass(frozen=True)
class GeneratedScale(Scale):
    """A small network's function of the timestep, TDQ: `Generated`."""

    encoding: TimeEncoding
    hidden: tuple[int, ...]
    dropout: float
    last: LastLayer
    seed: int = 0
    momentum: float = 0.95
    estimator: Observer = DEFAULT_OBSERVER

    def __post_init__(self) -> None:
        check_fields(self, hidden=sequence_of(COUNT), dropout=DECAY, seed=SEED, momentum=DECAY)

    def source(self, spec: QuantSpec, context: TimestepContext) -> Source:
        """`Generated`, whose arguments have the names of the fields here."""
        return Generated(spec, context, **vars(self))

    def seeded_for(self, name: str) -> Scale:
        """Another start of the network."""
        return replace(self, seed=derive_seed(self.seed, name))

    def merged(self) -> Scale:
        """The network's values on the finite set."""
        return PerStepScale(0.0)


@dataclass(frozen=True)
class StatisticsScale(Scale):
    """A small network's function of the activation's statistics, and of the timestep where it has an encoding: `FromStatistics`."""

    encoding: TimeEncoding | None
    hidden: tuple[int, ...]
    dropout: float = 0.0
    last: LastLayer = "zero"
    seed: int = 0
    momentum: float = 0.0
    estimator: Observer = DEFAULT_OBSERVER

    def __post_init__(self) -> None:
        check_fields(self, hidden=sequence_of(COUNT), dropout=DECAY, seed=SEED, momentum=DECAY)

    def source(self, spec: QuantSpec, context: TimestepContext) -> Source:
        """`FromStatistics`, whose arguments have the names of the fields here."""
        return FromStatistics(spec, context, **vars(self))

    def seeded_for(self, name: str) -> Scale:
        """Another start of the network."""
        return replace(self, seed=derive_seed(self.seed, name))

    def merged(self) -> Scale:
        """The network, which needs the activation; no more of how it was made."""
        return StatisticsScale(self.encoding, tuple(self.hidden))


@dataclass(frozen=True)
class TrainedScale(Scale):
    """Any of the others, under a form of quantization-aware training: `TrainableQuantizer`.

    Args:
        form: the arithmetic on the step.
        scale: where the step comes from.
        centre: of the grid, see `TrainableQuantizer`.
    """

    form: QATQuantizeFn
    scale: Scale
    centre: Centre = "zero"

    def __post_init__(self) -> None:
        checked_centre(self.centre)

    def source(self, spec: QuantSpec, context: TimestepContext) -> Source:
        """That of `scale`."""
        return self.scale.source(spec, context)

    def quantizer(self, spec: QuantSpec, context: TimestepContext) -> AffineQuantizer:
        """`TrainableQuantizer`."""
        return TrainableQuantizer(self.source(spec, context), self.form, self.centre)

    def seeded_for(self, name: str) -> Scale:
        """That of `scale`."""
        return replace(self, scale=self.scale.seeded_for(name))

    def merged(self) -> Scale:
        """The same without noise, on what is left of the scale."""
        return TrainedScale(self.form.for_inference(), self.scale.merged(), self.centre)


@dataclass(frozen=True)
class ScalePlan:
    """Scales of the Temporal Information Block's activations, and of all others."""

    temporal: Scale
    rest: Scale

    def __post_init__(self) -> None:
        for name, scale in vars(self).items():
            if not hasattr(scale, "merged"):
                raise ValueError(
                    f"scales.{name} must be a record such as StaticScale, with its _target_, got {scale!r}"
                )
            scale_to_json(scale.merged())  # what could not be stored is refused before anything is computed

    def of(self, role: Role | None) -> Scale:
        """That of a layer with this role (None: attention's operands)."""
        return self.temporal if role in TEMPORAL_ROLES else self.rest


def scale_to_json(scale: Scale) -> dict[str, Any]:
    """What a stored model needs to know of a merged scale.

    Raises:
        TypeError: a kind that cannot be stored.
    """
    match scale:
        case StaticScale():
            return {"kind": "static"}
        case PerStepScale():
            return {"kind": "per_step"}
        case IntervalScale():
            return {"kind": "intervals", "count": scale.count, "train_timesteps": scale.train_timesteps}
        case DynamicScale():
            return {"kind": "dynamic", "per": scale.per, "levels": scale.levels}
        case StatisticsScale():
            encoding = None if scale.encoding is None else encoding_to_json(scale.encoding)
            return {"kind": "statistics", "encoding": encoding, "hidden": list(scale.hidden)}
        case TrainedScale():
            inner = {"form": form_to_json(scale.form), "scale": scale_to_json(scale.scale)}
            return {"kind": "trained", **inner, "centre": scale.centre}
        case _:
            kinds = "StaticScale, PerStepScale, IntervalScale, DynamicScale, StatisticsScale, TrainedScale"
            raise TypeError(f"a {type(scale).__name__} must be merged before it is stored: into one of {kinds}")


def scale_from_json(data: Mapping[str, Any]) -> Scale:
    """The inverse of `scale_to_json`; ValueError for an unknown kind."""
    match data["kind"]:
        case "static":
            return StaticScale().merged()
        case "per_step":
            return PerStepScale().merged()
        case "intervals":
            return IntervalScale(data["count"], data["train_timesteps"]).merged()
        case "dynamic":
            return DynamicScale(data["per"], data.get("levels", "full"))  # older files leave no level out
        case "statistics":
            encoding = None if data["encoding"] is None else encoding_from_json(data["encoding"])
            return StatisticsScale(encoding, tuple(data["hidden"]))
        case "trained":
            return TrainedScale(form_from_json(data["form"]), scale_from_json(data["scale"]), data["centre"])
        case kind:
            known = "static, per_step, intervals, dynamic, statistics, trained"
            raise ValueError(f"unknown kind of scale {kind!r}; known: {known}")

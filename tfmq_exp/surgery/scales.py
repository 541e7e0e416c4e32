"""Choice of the scale provider of every activation, by role."""

from dataclasses import dataclass

from tfmq_exp.core.records import encode
from tfmq_exp.denoisers.structure import TEMPORAL_ROLES, Role
from tfmq_exp.quant.scales.base import ScaleConfig
from tfmq_exp.quant.scales.dynamic import DynamicConfig, DynamicGeneratorConfig
from tfmq_exp.quant.scales.running_range import PerStepConfig, StaticConfig, TimestepGroupConfig
from tfmq_exp.quant.timestep_encoding import Frequency, Normalised, RandomFourier

# Of a stored model: what is left after learning, and the encodings of networks that stay.
STORED_SCALES = (
    *(StaticConfig, PerStepConfig, TimestepGroupConfig, DynamicConfig, DynamicGeneratorConfig),
    *(Frequency, Normalised, RandomFourier),
)


@dataclass(frozen=True)
class ScalePlan:
    """Scales of the Temporal Information Block's activations, and of all others."""

    temporal: ScaleConfig
    default: ScaleConfig

    def __post_init__(self) -> None:
        for name, scale in vars(self).items():
            if not isinstance(scale, ScaleConfig):
                raise ValueError(f"scales.{name} must be a ScaleConfig, such as StaticConfig, got {scale!r}")
            encode(scale.tabulated(), STORED_SCALES)  # refuse what could not be stored before anything is computed

    def of(self, role: Role | None) -> ScaleConfig:
        """Scale config of a layer with this role (None: attention's operands)."""
        return self.temporal if role in TEMPORAL_ROLES else self.default

"""S_N: N scales, each for an equal part of the training timesteps (TDQ, arXiv 2306.02316, supplement, section 5)."""

from dataclasses import dataclass
from typing import ClassVar

from tfmq_exp.core.validate import COUNT, WrongValueError, check_fields
from tfmq_exp.quant.scales.base import EMAConfig, ScaleConfig
from tfmq_exp.quant.scales.per_step import PerStepScale
from tfmq_exp.quant.spec import QuantSpec
from tfmq_exp.quant.timestep_context import TimestepContext


@dataclass(frozen=True)
class TimestepGroupConfig(EMAConfig):
    """Configuration of `TimestepGroupScale`.

    Args:
        count: N.
        train_timesteps: T, of the schedule that the network was trained on.
        momentum, observer: see `EMAConfig`.
    """

    kind: ClassVar[str] = "timestep_groups"
    count: int
    train_timesteps: int

    def __post_init__(self) -> None:
        super().__post_init__()
        check_fields(self, count=COUNT, train_timesteps=COUNT)
        if self.count > self.train_timesteps:
            at_most = f"at most train_timesteps, {self.train_timesteps}"
            raise WrongValueError(type(self).__name__, "count", at_most, self.count)

    def build(self, spec: QuantSpec, context: TimestepContext) -> "TimestepGroupScale":
        return TimestepGroupScale(self, spec, context)

    def tabulated(self) -> ScaleConfig:
        return TimestepGroupConfig(self.count, self.train_timesteps)


class TimestepGroupScale(PerStepScale):
    """Timestep t reads range floor(t N / T); N = 1 is one static range. Groups without a step have no entry."""

    per_step = False

    def __init__(self, config: TimestepGroupConfig, spec: QuantSpec, context: TimestepContext) -> None:
        groups = [t * config.count // config.train_timesteps for t in context.timesteps]
        used = sorted(set(groups))
        super().__init__(config, spec, context, [used.index(group) for group in groups])
        self.unread = config.count - len(used)  # groups without a timestep

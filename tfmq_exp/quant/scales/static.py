"""One scale for all timesteps."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from tfmq_exp.quant.scales.base import EMAConfig, EMARange
from tfmq_exp.quant.spec import QParams, QuantSpec
from tfmq_exp.quant.timestep_context import TimestepContext


@dataclass(frozen=True)
class StaticConfig(EMAConfig):
    """Configuration of `StaticScale`."""

    kind: ClassVar[str] = "static"

    def build(self, spec: QuantSpec, context: TimestepContext) -> "StaticScale":
        return StaticScale(self, spec)


class StaticScale(EMARange):
    """The running range of all batches, whatever their timesteps."""

    def observe(self, x: Float[Tensor, "batch *rest"]) -> None:
        self.update_range(x, torch.zeros(len(x), dtype=torch.long, device=x.device))

    def forward(self, x: Float[Tensor, "batch *rest"]) -> QParams:
        """One pair, shape [1]."""
        return QParams(self.scale, self.zero_point)

    def step_table(self, steps: int) -> QParams | None:
        """The same entry for every step."""
        return QParams(self.scale.expand(steps), self.zero_point.expand(steps))

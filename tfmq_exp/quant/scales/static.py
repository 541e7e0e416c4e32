"""One range for all timesteps."""

import torch
from jaxtyping import Float
from torch import Tensor

from tfmq_exp.quant.observers import Observer
from tfmq_exp.quant.scales.base import DEFAULT_OBSERVER, EMARange
from tfmq_exp.quant.spec import QParams, QuantSpec


class Static(EMARange):
    """The running range of every batch, whatever its timesteps."""

    def __init__(self, spec: QuantSpec, *, momentum: float = 0.0, estimator: Observer = DEFAULT_OBSERVER) -> None:
        super().__init__(spec, entries=1, momentum=momentum, estimator=estimator)

    def observe(self, x: Float[Tensor, "batch *rest"]) -> None:
        """Move the range towards this batch's."""
        self.show(x, torch.zeros(len(x), dtype=torch.long, device=x.device))

    def forward(self, x: Float[Tensor, "batch *rest"]) -> QParams:
        """The same pair for every row."""
        return QParams(self.scale, self.zero_point)

    def step_table(self, steps: int) -> QParams | None:
        """The same entry for every step."""
        return QParams(self.scale.expand(steps), self.zero_point.expand(steps))

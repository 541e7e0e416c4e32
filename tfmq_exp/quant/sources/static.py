"""One range for all timesteps."""

from jaxtyping import Float
from torch import Tensor

from tfmq_exp.quant.sources.base import RunningRange
from tfmq_exp.quant.spec import QParams, QuantSpec


class Static(RunningRange):
    """The running range of every batch, whatever its timesteps.

    Args:
        momentum: weight of the past; 0.95 in Q-Diffusion and TFMQ-DM.
    """

    def __init__(self, spec: QuantSpec, *, momentum: float) -> None:
        super().__init__(spec, entries=1, momentum=momentum)

    def observe(self, x: Float[Tensor, "batch *rest"]) -> None:
        """Move the range towards this batch's."""
        self.update(x.amin().reshape(1), x.amax().reshape(1))

    def forward(self, x: Float[Tensor, "batch *rest"]) -> QParams:
        """The same pair for every row."""
        return QParams(self.scale, self.zero_point)

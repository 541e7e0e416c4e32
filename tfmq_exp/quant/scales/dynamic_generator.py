"""Dynamic quantization with a generator: the interval is a network's function of the values at hand (TDQ, supplement, table 1)."""

from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from tfmq_exp.quant.observers import Observer
from tfmq_exp.quant.scales.base import DEFAULT_OBSERVER
from tfmq_exp.quant.scales.static import Static
from tfmq_exp.quant.scales.tdq import LastLayer, intervals, network
from tfmq_exp.quant.spec import QParams, QuantSpec
from tfmq_exp.quant.timestep_context import TimestepContext
from tfmq_exp.quant.timestep_encoding import TimeEncoding

STATISTICS = 4


class FromStatistics(Static):
    """s = softplus(MLP(min, max, mean, variance of the sample; encoding of t) + softplus^-1(s_0)).

    It needs the activation itself, so it stays a network while sampling. The paper does not say how the statistics are
    taken; here they are each sample's own, in units of the calibrated range (squared for the variance), and pass no gradient
    on to the activation.

    Args:
        spec: the grid, without a zero point.
        context: the timesteps of the batch.
        encoding: of the timestep, read beside the statistics; None: statistics alone.
        hidden, dropout, last, seed, momentum, estimator: as for `Generated`.
    """

    generates = True

    def __init__(
        self,
        spec: QuantSpec,
        context: TimestepContext,
        *,
        encoding: TimeEncoding | None,
        hidden: Sequence[int],
        dropout: float,
        last: LastLayer,
        seed: int,
        momentum: float = 0.0,
        estimator: Observer = DEFAULT_OBSERVER,
    ) -> None:
        if spec.scheme == "affine":
            raise ValueError("an interval from statistics needs a symmetric or unsigned grid, got affine")
        super().__init__(spec, momentum=momentum, estimator=estimator)
        self.context, self.encoding = context, encoding
        width = STATISTICS + (0 if encoding is None else encoding(torch.tensor(context.timesteps[:1])).shape[1])
        self.mlp = network(width, hidden, dropout, last, torch.Generator().manual_seed(seed))

    def statistics(self, x: Float[Tensor, "batch *rest"]) -> Float[Tensor, "batch 4"]:
        """Minimum, maximum, mean and variance of every sample, in units of the calibrated range."""
        rows = x.detach().flatten(1).float()
        reach = self.scale.detach() * self.spec.qmax
        mean, variance = rows.mean(dim=1) / reach, rows.var(dim=1, unbiased=False) / reach.square()
        return torch.stack([rows.amin(dim=1) / reach, rows.amax(dim=1) / reach, mean, variance], dim=1)

    def forward(self, x: Float[Tensor, "batch *rest"]) -> QParams:
        """A pair per row, shape [batch, 1, ...]."""
        with torch.autocast(x.device.type, enabled=False):
            read = self.statistics(x).to(self.scale.dtype)
            if self.encoding is not None:
                read = torch.cat([read, self.encoding(self.context.t).to(read.dtype)], dim=1)
            scale = intervals(self.scale, self.mlp(read).squeeze(1)).reshape(-1, *(1,) * (x.dim() - 1))
        return QParams(scale, torch.zeros_like(scale, requires_grad=False))

    def step_table(self, steps: int) -> None:
        """None: the scale depends on the tensor."""

    def trainable(self) -> Iterator[nn.Parameter]:
        """The network."""
        return self.mlp.parameters()

    def clamp_parameters(self) -> None:
        """Softplus keeps intervals positive."""

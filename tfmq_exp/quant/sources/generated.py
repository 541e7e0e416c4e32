"""Temporal Dynamic Quantization: the interval is a small network's function of the timestep (TDQ, arXiv 2306.02316)."""

from collections.abc import Iterator, Sequence
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import softplus

from tfmq_exp.quant.clock import StepClock
from tfmq_exp.quant.encodings import TimeEncoding
from tfmq_exp.quant.functional import SMALLEST_SCALE
from tfmq_exp.quant.ranges import RangeEstimator
from tfmq_exp.quant.sources.base import DEFAULT_ESTIMATOR
from tfmq_exp.quant.sources.per_step import PerStep
from tfmq_exp.quant.sources.static import Static
from tfmq_exp.quant.spec import QParams, QuantSpec

LastLayer = Literal["zero", "default", "he", "xavier", "gaussian"]


def softplus_inverse(y: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """The x with log(1 + e^x) = y, for y > 0."""
    return y + torch.log(-torch.expm1(-y))


def initialise(layer: nn.Linear, how: LastLayer, generator: torch.Generator) -> None:
    """One layer. `default` is what torch gives a linear layer, bias included; else the bias starts at 0."""
    bound = layer.in_features**-0.5
    nn.init.zeros_(layer.bias)
    if how == "zero":
        nn.init.zeros_(layer.weight)
    elif how == "default":
        nn.init.uniform_(layer.weight, -bound, bound, generator=generator)
        nn.init.uniform_(layer.bias, -bound, bound, generator=generator)
    elif how == "he":
        nn.init.kaiming_normal_(layer.weight, generator=generator)
    elif how == "xavier":
        nn.init.xavier_normal_(layer.weight, generator=generator)
    elif how == "gaussian":
        nn.init.normal_(layer.weight, generator=generator)
    else:
        raise ValueError(f"the last layer starts as zero, default, he, xavier or gaussian, got {how!r}")


class Generated(Static):
    """s(t) = softplus(MLP(encoding of t) + softplus^-1(s_0)), s_0 the calibrated static interval.

    With a zero last layer every interval starts at s_0; other starts are the supplement's ablation (table 7). The lower end
    of the calibrated range is kept: z(t) = round(-lo / s(t)), on the grid. The network is evaluated on the whole finite set
    at once, so that a row's interval does not depend on its batch, and the merged table is the same numbers.

    Args:
        spec: the grid.
        clock: the finite set.
        encoding: what the network reads.
        hidden: widths of its hidden layers; (64, 64, 64) in TDQ, (16, 16) in TDQ_thin.
        dropout: before the last layer, while it learns.
        last: how the last layer starts.
        seed: of the other layers' weights.
        momentum, estimator: of the calibrated range.
    """

    encoded: Tensor

    def __init__(
        self,
        spec: QuantSpec,
        clock: StepClock,
        *,
        encoding: TimeEncoding,
        hidden: Sequence[int],
        dropout: float,
        last: LastLayer,
        seed: int,
        momentum: float = 0.0,
        estimator: RangeEstimator = DEFAULT_ESTIMATOR,
    ) -> None:
        super().__init__(spec, momentum=momentum, estimator=estimator)
        self.clock = clock
        self.register_buffer("encoded", encoding(torch.tensor(clock.timesteps)), persistent=False)
        generator = torch.Generator().manual_seed(seed)
        layers: list[nn.Module] = []
        width = self.encoded.shape[1]
        for size in hidden:
            layer = nn.Linear(width, size)
            initialise(layer, "default", generator)
            layers += [layer, nn.ReLU()]
            width = size
        output = nn.Linear(width, 1)
        initialise(output, last, generator)
        nn.init.zeros_(output.bias)  # s_0 is the bias of the last layer
        self.mlp = nn.Sequential(*layers, nn.Dropout(dropout), output).requires_grad_(False)

    def table(self) -> QParams:
        """Scale and zero point of every step of the finite set, shape [steps]."""
        start = softplus_inverse(self.scale.double()).to(self.scale.dtype)
        moved = self.mlp(self.encoded).squeeze(1)
        # a quotient, so that where the network says 0 the interval is s_0 itself and not nearly
        scale = (self.scale * (softplus(moved + start) / softplus(start))).clamp(min=SMALLEST_SCALE)
        zero_point = torch.zeros_like(scale, requires_grad=False)
        if self.spec.scheme == "affine":
            below = self.zero_point * self.scale  # how far the calibrated range reaches below zero
            zero_point = (below / scale.detach()).round().clamp(0, self.spec.qmax)
        return QParams(scale, zero_point)

    def forward(self, x: Float[Tensor, "batch *rest"]) -> QParams:
        """A pair per row, shape [batch, 1, ...]."""
        steps = self.clock.index
        shape = (len(steps),) + (1,) * (x.dim() - 1)
        scale, zero_point = self.table()
        return QParams(scale[steps].reshape(shape), zero_point[steps].reshape(shape))

    def trainable(self) -> Iterator[nn.Parameter]:
        """The network."""
        return self.mlp.parameters()

    def keep_valid(self) -> None:
        """Softplus keeps intervals positive."""

    @torch.no_grad()
    def merged(self) -> PerStep:
        """The table, as a source without a network: nothing is left to compute while sampling."""
        table = PerStep(self.spec, self.clock).to(self.scale.device)
        scale, zero_point = self.table()
        table.scale.copy_(scale)
        table.zero_point.copy_(zero_point)
        return table

"""Temporal Dynamic Quantization: the interval is a small network's function of the timestep (TDQ, arXiv 2306.02316)."""

from collections.abc import Iterator, Sequence
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import softplus

from tfmq_exp.quant.functional import SMALLEST_SCALE
from tfmq_exp.quant.observers import Observer
from tfmq_exp.quant.scales.base import DEFAULT_OBSERVER
from tfmq_exp.quant.scales.per_step import PerStep
from tfmq_exp.quant.scales.static import Static
from tfmq_exp.quant.spec import QParams, QuantSpec
from tfmq_exp.quant.timestep_context import TimestepContext
from tfmq_exp.quant.timestep_encoding import TimeEncoding

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


def network(
    width: int, hidden: Sequence[int], dropout: float, last: LastLayer, generator: torch.Generator
) -> nn.Sequential:
    """Linear layers with ReLU between them and one output, whose bias is 0; dropout before the last."""
    layers: list[nn.Module] = []
    for size in hidden:
        layer = nn.Linear(width, size)
        initialise(layer, "default", generator)
        layers += [layer, nn.ReLU()]
        width = size
    output = nn.Linear(width, 1)
    initialise(output, last, generator)
    nn.init.zeros_(output.bias)  # the interval at the start is the bias of the last layer
    return nn.Sequential(*layers, nn.Dropout(dropout), output).requires_grad_(False)


def intervals(start: Float[Tensor, "*start"], moved: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """softplus(moved + softplus^-1(start)), as a multiple of `start` that is exactly 1 where `moved` is 0."""
    bias = softplus_inverse(start.double()).to(start.dtype)
    return (start * (softplus(moved + bias) / softplus(bias))).clamp(min=SMALLEST_SCALE)


class Generated(Static):
    """s(t) = softplus(MLP(encoding of t) + softplus^-1(s_0)), s_0 the calibrated static interval.

    With a zero last layer every interval starts at s_0; other starts are the supplement's ablation (table 7). The lower end
    of the calibrated range is kept: z(t) = round(-lo / s(t)), on the grid. The network is evaluated on the whole finite set
    at once, so that a row's interval does not depend on its batch, and the merged table is the same numbers.

    Args:
        spec: the grid.
        context: the finite set.
        encoding: what the network reads.
        hidden: widths of its hidden layers; (64, 64, 64) in TDQ, (16, 16) in TDQ_thin.
        dropout: before the last layer, while it learns.
        last: how the last layer starts.
        seed: of the other layers' weights.
        momentum, estimator: of the calibrated range.
    """

    encoded: Tensor
    generates = True

    def __init__(
        self,
        spec: QuantSpec,
        context: TimestepContext,
        *,
        encoding: TimeEncoding,
        hidden: Sequence[int],
        dropout: float,
        last: LastLayer,
        seed: int,
        momentum: float = 0.0,
        estimator: Observer = DEFAULT_OBSERVER,
    ) -> None:
        super().__init__(spec, momentum=momentum, estimator=estimator)
        self.context = context
        self.register_buffer("encoded", encoding(torch.tensor(context.timesteps)), persistent=False)
        self.encoding, self.hidden = encoding, tuple(hidden)
        self.mlp = network(self.encoded.shape[1], self.hidden, dropout, last, torch.Generator().manual_seed(seed))
        self.rows: Float[Tensor, "batch"] | None = None  # the batch's intervals, where a bank has evaluated the network

    def step_table(self, steps: int) -> QParams:
        """`table`."""
        return self.table()

    def table(self) -> QParams:
        """Scale and zero point of every step of the finite set, shape [steps]."""
        scale = intervals(self.scale, self.mlp(self.encoded).squeeze(1))
        return QParams(scale, self.zero_points(scale))

    def zero_points(self, scale: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """Of some intervals: the lower end of the calibrated range is kept."""
        if self.spec.scheme != "affine":
            return torch.zeros_like(scale, requires_grad=False)
        below = self.zero_point * self.scale  # how far the calibrated range reaches below zero
        return (below / scale.detach()).round().clamp(0, self.spec.qmax)

    def forward(self, x: Float[Tensor, "batch *rest"]) -> QParams:
        """A pair per row, shape [batch, 1, ...]."""
        shape = (-1,) + (1,) * (x.dim() - 1)
        if self.rows is not None:
            return QParams(self.rows.reshape(shape), self.zero_points(self.rows).reshape(shape))
        steps = self.context.index
        scale, zero_point = self.table()
        return QParams(scale[steps].reshape(shape), zero_point[steps].reshape(shape))

    def trainable(self) -> Iterator[nn.Parameter]:
        """The network."""
        return self.mlp.parameters()

    def clamp_parameters(self) -> None:
        """Softplus keeps intervals positive."""

    @torch.no_grad()
    def merged(self) -> PerStep:
        """The table, as a source without a network: nothing is left to compute while sampling."""
        table = PerStep(self.spec, self.context).to(self.scale.device)
        scale, zero_point = self.table()
        table.scale.copy_(scale)
        table.zero_point.copy_(zero_point)
        return table

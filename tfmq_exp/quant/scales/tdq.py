"""Temporal Dynamic Quantization: the scale is a small network's function of the timestep (TDQ, arXiv 2306.02316)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from tfmq_exp.quant.scales.base import ScaleConfig, per_row
from tfmq_exp.quant.scales.generator import GeneratedScale, GeneratorConfig, TimeEncoding, softplus_scale
from tfmq_exp.quant.scales.observed_ranges import EMARange, PerStepConfig
from tfmq_exp.quant.spec import QParams, QuantSpec
from tfmq_exp.quant.timestep_context import TimestepContext


@dataclass(frozen=True)
class TDQConfig(GeneratorConfig):
    """Configuration of `TDQScale`."""

    encoding: TimeEncoding

    def build(self, spec: QuantSpec, context: TimestepContext) -> "TDQScale":
        return TDQScale(self, spec, context)

    def tabulated(self) -> ScaleConfig:
        return PerStepConfig()


class TDQScale(GeneratedScale):
    """s(t) = softplus(MLP(encoding of t) + softplus^-1(s_0)), s_0 the calibrated static scale.

    The lower end of the calibrated range is kept: z(t) = round(-lo / s(t)), within the integer range. The network is evaluated
    on the whole finite set at once, so that a row's scale does not depend on its batch, and the table has the same numbers.
    """

    encoded: Tensor

    def __init__(self, config: TDQConfig, spec: QuantSpec, context: TimestepContext) -> None:
        encoded = config.encoding(torch.tensor(context.timesteps))
        super().__init__(config, spec, context, encoded.shape[1])
        self.register_buffer("encoded", encoded, persistent=False)

    def table(self) -> QParams:
        scale = softplus_scale(self.scale, self.mlp(self.encoded).squeeze(1))
        return QParams(scale, self.zero_points(scale))

    def zero_points(self, scale: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """Zero points that keep the lower end of the calibrated range."""
        if self.spec.scheme != "affine":
            return torch.zeros_like(scale, requires_grad=False)
        below = self.zero_point * self.scale  # distance of the lower end below zero
        return (below / scale.detach()).round().clamp(0, self.spec.qmax)

    def forward(self, x: Float[Tensor, "batch *rest"]) -> QParams:
        """A pair per row, shape [batch, 1, ...]."""
        scale = self.context.scales.get(self)
        if scale is not None:
            return QParams(per_row(scale, x), per_row(self.zero_points(scale), x))
        steps, (scale, zero_point) = self.context.steps_of(x), self.table()
        return QParams(per_row(scale[steps], x), per_row(zero_point[steps], x))

    @torch.no_grad()
    def tabulated(self) -> EMARange:
        table = EMARange(PerStepConfig(), self.spec, self.context).to(self.scale.device)
        scale, zero_point = self.table()
        table.scale.copy_(scale)
        table.zero_point.copy_(zero_point)
        return table


class BatchedGenerators:
    """Evaluates all TDQ networks of a model at the timesteps of a batch, in a few batched products in place of many small ones.

    While learning, timesteps are drawn from all training timesteps, not from the finite set; a table of them all would be
    evaluated for a few rows. The scales keep their parameters, so what trains, saves or tabulates one of them is not concerned.
    Networks of one shape that read one encoding are stacked, layer by layer.
    """

    def __init__(self, scales: Sequence[TDQScale]) -> None:
        groups: dict[object, list[TDQScale]] = {}
        for scale in scales:
            config = scale.generator
            groups.setdefault((config.encoding, config.hidden_dims, config.dropout), []).append(scale)
        self.groups = list(groups.values())

    def scales(self, t: Int[Tensor, "rows"]) -> dict[TDQScale, Float[Tensor, "rows"]]:
        """Every provider with its scale for each timestep."""
        # half precision would move a scale by more than it is learned to differ between timesteps
        with torch.autocast(t.device.type, enabled=False):
            return {
                scale: rows for group in self.groups for scale, rows in zip(group, evaluated(group, t), strict=True)
            }


def evaluated(group: Sequence[TDQScale], t: Int[Tensor, "rows"]) -> tuple[Float[Tensor, "rows"], ...]:
    """Scales of networks that have the same layers."""
    first: Any = group[0]
    hidden: Tensor = first.encoding(t).expand(len(group), -1, -1)
    for i, layer in enumerate(first.mlp):
        if isinstance(layer, nn.Linear):
            layers: list[nn.Linear] = [scale.mlp[i] for scale in group]  # type: ignore[misc]
            weight = torch.stack([each.weight for each in layers])
            bias = torch.stack([each.bias for each in layers])
            hidden = torch.baddbmm(bias[:, None], hidden, weight.mT)
        else:
            hidden = layer(hidden)
    return softplus_scale(torch.stack([scale.scale for scale in group]), hidden.squeeze(2)).unbind()

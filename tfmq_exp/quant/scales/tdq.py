"""Temporal Dynamic Quantization: the scale is a small network's function of the timestep (TDQ, arXiv 2306.02316)."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from tfmq_exp.quant.scales.base import ScaleConfig
from tfmq_exp.quant.scales.generator import GeneratedScale, GeneratorConfig, softplus_scale
from tfmq_exp.quant.scales.per_step import PerStepConfig, PerStepScale
from tfmq_exp.quant.spec import QParams, QuantSpec
from tfmq_exp.quant.timestep_context import TimestepContext
from tfmq_exp.quant.timestep_encoding import TimeEncoding


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

    def step_table(self, steps: int) -> QParams:
        """`table`."""
        return self.table()

    def table(self) -> QParams:
        """Scale and zero point of every step of the finite set, shape [steps]."""
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
        shape = (-1,) + (1,) * (x.dim() - 1)
        rows = self.context.scales.get(self)
        if rows is not None:
            return QParams(rows.reshape(shape), self.zero_points(rows).reshape(shape))
        steps, (scale, zero_point) = self.context.index, self.table()
        return QParams(scale[steps].reshape(shape), zero_point[steps].reshape(shape))

    @torch.no_grad()
    def tabulated(self) -> PerStepScale:
        table = PerStepScale(PerStepConfig(), self.spec, self.context).to(self.scale.device)
        scale, zero_point = self.table()
        table.scale.copy_(scale)
        table.zero_point.copy_(zero_point)
        return table

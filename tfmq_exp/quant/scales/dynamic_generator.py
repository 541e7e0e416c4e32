"""Dynamic quantization with a generator: the scale is a network's function of the present values (TDQ, supplement, table 1)."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from tfmq_exp.quant.scales.base import ScaleConfig
from tfmq_exp.quant.scales.generator import GeneratedScale, GeneratorConfig, softplus_scale
from tfmq_exp.quant.spec import QParams, QuantSpec
from tfmq_exp.quant.timestep_context import TimestepContext

STATISTICS = 4


@dataclass(frozen=True)
class DynamicGeneratorConfig(GeneratorConfig):
    """Configuration of `DynamicGeneratorScale`; without an encoding it reads the statistics alone."""

    kind: ClassVar[str] = "dynamic_generator"

    def build(self, spec: QuantSpec, context: TimestepContext) -> "DynamicGeneratorScale":
        return DynamicGeneratorScale(self, spec, context)

    def tabulated(self) -> ScaleConfig:
        return DynamicGeneratorConfig(self.encoding, self.hidden_dims)


class DynamicGeneratorScale(GeneratedScale):
    """s = softplus(MLP(min, max, mean, variance of the sample; encoding of t) + softplus^-1(s_0)).

    It needs the activation itself, so it stays a network while sampling. The paper does not say how the statistics are
    taken; here they are each sample's own, in units of the calibrated range (squared for the variance), and pass no gradient
    on to the activation.

    Raises:
        ValueError: a spec with a zero point.
    """

    def __init__(self, config: DynamicGeneratorConfig, spec: QuantSpec, context: TimestepContext) -> None:
        if spec.scheme == "affine":
            raise ValueError("a scale from statistics needs a symmetric or unsigned spec, got affine")
        encoding, one = config.encoding, torch.tensor(context.timesteps[:1])
        super().__init__(config, spec, context, STATISTICS + (0 if encoding is None else encoding(one).shape[1]))

    def statistics(self, x: Float[Tensor, "batch *rest"]) -> Float[Tensor, "batch 4"]:
        """Minimum, maximum, mean and variance of every sample, in units of the calibrated range."""
        rows = x.detach().flatten(1).float()
        reach = self.scale.detach() * self.spec.qmax
        mean, variance = rows.mean(dim=1) / reach, rows.var(dim=1, unbiased=False) / reach.square()
        return torch.stack([rows.amin(dim=1) / reach, rows.amax(dim=1) / reach, mean, variance], dim=1)

    def forward(self, x: Float[Tensor, "batch *rest"]) -> QParams:
        """A pair per row, shape [batch, 1, ...]."""
        with torch.autocast(x.device.type, enabled=False):
            inputs = self.statistics(x).to(self.scale.dtype)
            if self.encoding is not None:
                inputs = torch.cat([inputs, self.encoding(self.context.t).to(inputs.dtype)], dim=1)
            scale = softplus_scale(self.scale, self.mlp(inputs).squeeze(1)).reshape(-1, *(1,) * (x.dim() - 1))
        return QParams(scale, torch.zeros_like(scale, requires_grad=False))

    def step_table(self, steps: int) -> None:
        """None: the scale depends on the tensor."""

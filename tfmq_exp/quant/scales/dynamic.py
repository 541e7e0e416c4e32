"""Dynamic quantization: the scale follows from the tensor that is being quantized, by its range or by a network of it."""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from tfmq_exp.quant.functional import qparams_from_range
from tfmq_exp.quant.observers import include_zero
from tfmq_exp.quant.scales.base import ScaleConfig, ScaleProvider, per_row
from tfmq_exp.quant.scales.generator import GeneratedScale, GeneratorConfig, softplus_scale
from tfmq_exp.quant.spec import QParams, QuantSpec, range_ratio
from tfmq_exp.quant.timestep_context import TimestepContext

STATISTICS = 4


@dataclass(frozen=True)
class DynamicConfig(ScaleConfig):
    """Configuration of `DynamicScale`.

    `granularity`: `sample`, a range for each row of the batch; `token`, one for each vector along the last axis, for inputs of
    linear layers; or `tensor`, one for all of them, which makes an image depend on the other images of its batch.
    """

    kind: ClassVar[str] = "dynamic"
    granularity: Literal["tensor", "sample", "token"]

    def build(self, spec: QuantSpec, context: TimestepContext) -> "DynamicScale":
        return DynamicScale(self, spec)


class DynamicScale(ScaleProvider):
    """Min and max at run time: exact ranges without calibration, for a pass over every activation."""

    needs_data = False

    def __init__(self, config: DynamicConfig, spec: QuantSpec) -> None:
        super().__init__()
        self.config, self.spec = config, spec
        self.ratio = range_ratio(spec, config.int_range)

    def forward(self, x: Float[Tensor, "batch *rest"]) -> QParams:
        """Shape [batch, 1, ...], [batch, ..., 1] by tokens, or [1, 1, ...] for the whole tensor."""
        match self.config.granularity:
            case "tensor":
                lo, hi = (per_row(end, x) for end in x.detach().aminmax())
            case "token":
                lo, hi = x.detach().aminmax(dim=-1, keepdim=True)
            case "sample":
                dims = tuple(range(1, x.dim()))
                lo, hi = per_row(x.detach().amin(dims), x), per_row(x.detach().amax(dims), x)
        lo, hi = include_zero(lo, hi)
        return qparams_from_range(lo * self.ratio, hi * self.ratio, self.spec)


@dataclass(frozen=True)
class DynamicGeneratorConfig(GeneratorConfig):
    """Configuration of `DynamicGeneratorScale`; without an encoding it reads the statistics alone."""

    kind: ClassVar[str] = "dynamic_generator"

    def build(self, spec: QuantSpec, context: TimestepContext) -> "DynamicGeneratorScale":
        return DynamicGeneratorScale(self, spec, context)

    def tabulated(self) -> ScaleConfig:
        return DynamicGeneratorConfig(self.encoding, self.hidden_dims)


class DynamicGeneratorScale(GeneratedScale):
    """The scale is a network's function of the present values (TDQ, arXiv 2306.02316, supplement, table 1).

    s = softplus(MLP(min, max, mean, variance of the sample; encoding of t) + softplus^-1(s_0)). It needs the activation itself,
    so it stays a network while sampling. The paper does not say how the statistics are taken; here they are each sample's own, in
    units of the calibrated range (squared for the variance), and pass no gradient on to the activation. No zero point.
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
            scale = per_row(softplus_scale(self.scale, self.mlp(inputs).squeeze(1)), x)
        return QParams(scale, torch.zeros_like(scale, requires_grad=False))

    def table(self) -> None:
        """None: the scale depends on the tensor."""

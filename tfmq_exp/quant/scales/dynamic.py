"""Dynamic quantization: the range of the tensor that is being quantized."""

from dataclasses import dataclass, replace
from typing import ClassVar, Literal, Self, get_args

from jaxtyping import Float
from torch import Tensor

from tfmq_exp.core.validate import check_fields, one_of
from tfmq_exp.quant.functional import qparams_from_range
from tfmq_exp.quant.observers import Observer, include_zero
from tfmq_exp.quant.scales.base import ScaleConfig, ScaleProvider
from tfmq_exp.quant.spec import IntRangeKind, QParams, QuantSpec, range_ratio
from tfmq_exp.quant.timestep_context import TimestepContext


@dataclass(frozen=True)
class DynamicConfig(ScaleConfig):
    """Configuration of `DynamicScale`.

    Args:
        granularity: `sample`, a range for each row of the batch; or `tensor`, one for all of them, which makes an image
            depend on the other images of its batch.
        int_range: integers of a QAT quantizer: the largest value falls on the largest used code.
    """

    kind: ClassVar[str] = "dynamic"
    granularity: Literal["tensor", "sample"]
    int_range: IntRangeKind = "full"

    def __post_init__(self) -> None:
        check_fields(self, granularity=one_of("tensor", "sample"), int_range=one_of(*get_args(IntRangeKind)))

    def build(self, spec: QuantSpec, context: TimestepContext) -> "DynamicScale":
        return DynamicScale(self, spec)

    def tabulated(self) -> ScaleConfig:
        return self

    def for_qat(self, init: Observer, kind: IntRangeKind) -> Self:
        return replace(self, int_range=kind)


class DynamicScale(ScaleProvider):
    """Min and max at run time: exact ranges without calibration, for a pass over every activation."""

    needs_data = False

    def __init__(self, config: DynamicConfig, spec: QuantSpec) -> None:
        super().__init__()
        self.config, self.spec = config, spec
        self.ratio = 1.0 if config.int_range == "full" else range_ratio(spec, config.int_range)

    def forward(self, x: Float[Tensor, "batch *rest"]) -> QParams:
        """Shape [batch, 1, ...], or [1, 1, ...] for the whole tensor."""
        if self.config.granularity == "tensor":
            lo, hi = x.detach().aminmax()
        else:
            dims = tuple(range(1, x.dim()))
            lo, hi = x.detach().amin(dims), x.detach().amax(dims)
        shape = (-1,) + (1,) * (x.dim() - 1)
        lo, hi = include_zero(lo.reshape(shape), hi.reshape(shape))
        return qparams_from_range(lo * self.ratio, hi * self.ratio, self.spec)

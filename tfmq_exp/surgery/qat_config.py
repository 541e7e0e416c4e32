"""How what becomes integer is trained: a form for activations, one for weights, and where activation ranges start."""

from dataclasses import dataclass, fields, replace
from typing import Any, Literal

from tfmq_exp.denoisers.structure import Role
from tfmq_exp.quant.observers import Observer
from tfmq_exp.quant.qat.base import QATQuantizeFn
from tfmq_exp.quant.quantizers.trainable import Centre
from tfmq_exp.quant.range_init import ScaledToIntRange
from tfmq_exp.quant.spec import Scheme
from tfmq_exp.surgery.scales import Scale, TrainedScale

# What these layers read comes from SiLU: convolutions of residual blocks, embedding projections, the last layer.
AFTER_SILU = frozenset({Role.RES_CONV, Role.TIME_PROJ, Role.HEAD})


@dataclass(frozen=True)
class QATConfig:
    """The quantizers of one method of quantization-aware training.

    Args:
        activations: their form.
        weights: their form. Where their ranges start says the method's `weight_range`.
        start: where activation ranges start.
        after_silu: `symmetric` grids like everywhere, or `offset`, unsigned ones that start at the minimum of SiLU. Padding
            is 0, which an offset grid does not contain.
        elsewhere: other symmetric grids lie about zero, or about a number that is `learned`.

    Raises:
        ValueError: an unknown choice, or a form for weights alone.
    """

    activations: QATQuantizeFn
    weights: QATQuantizeFn
    start: Observer
    after_silu: Literal["symmetric", "offset"] = "symmetric"
    elsewhere: Literal["zero", "learned"] = "zero"

    def __post_init__(self) -> None:
        if self.after_silu not in ("symmetric", "offset"):
            raise ValueError(f"forms.after_silu must be symmetric or offset, got {self.after_silu!r}")
        if self.elsewhere not in ("zero", "learned"):
            raise ValueError(f"forms.elsewhere must be zero or learned, got {self.elsewhere!r}")
        if "gamma" in self.activations.further():
            raise ValueError("an activation's interval cannot be bent by gamma: learn_gamma is for weights")

    def grid(self, role: Role | None, scheme: Scheme) -> tuple[Scheme, Centre]:
        """Kind and centre of the grid of an input of a layer with this role (None: an operand of attention)."""
        if role in AFTER_SILU and self.after_silu == "offset":
            return "unsigned", "silu"
        return scheme, "zero" if scheme == "unsigned" else self.elsewhere

    def scale(self, scale: Scale, centre: Centre) -> Scale:
        """A source of steps under the form of activations, started where the plan says."""
        record: Any = scale
        levels = self.activations.levels
        own = {
            "estimator": ScaledToIntRange(self.start, levels),
            "levels": levels,
        }  # of those sources that have such a choice
        record = replace(record, **{field.name: own[field.name] for field in fields(record) if field.name in own})
        return TrainedScale(self.activations, record, centre)

"""Quantizers of one method of quantization-aware training."""

from dataclasses import dataclass
from typing import Literal

from tfmq_exp.core.validate import SWITCH, check_fields, one_of
from tfmq_exp.denoisers.structure import Role
from tfmq_exp.quant.observers import Observer
from tfmq_exp.quant.qat_functions import QATQuantizeFn
from tfmq_exp.quant.qat_quantizers import Offset
from tfmq_exp.quant.spec import Scheme

# Inputs of these layers come from SiLU: convolutions of residual blocks, embedding projections, the last layer.
AFTER_SILU = frozenset({Role.RES_CONV, Role.TIME_PROJ, Role.HEAD})


@dataclass(frozen=True)
class QATConfig:
    """Functions of activations and weights, and the initialization of activation ranges.

    Args:
        activations: function of activations.
        weights: function of weights. Their ranges are initialized by the method's `weight_observer`.
        range_init: initializes activation ranges.
        silu_offset: outputs of SiLU have an unsigned range that starts at SiLU's minimum. Padding is 0, which such a range
            does not contain.
        other_offset: symmetric ranges lie about `zero`, or about a number that is `learned`.

    Raises:
        ValueError: an unknown choice, or a function for weights alone.
    """

    activations: QATQuantizeFn
    weights: QATQuantizeFn
    range_init: Observer
    silu_offset: bool = False
    other_offset: Literal["zero", "learned"] = "zero"

    def __post_init__(self) -> None:
        check_fields(self, silu_offset=SWITCH, other_offset=one_of("zero", "learned"))
        if "gamma" in self.activations.extra_params():
            raise ValueError("an activation's interval cannot be bent by gamma: learn_gamma is for weights")

    def offset(self, role: Role | None, scheme: Scheme) -> tuple[Scheme, Offset]:
        """Scheme and offset of an input of a layer with this role (None: an operand of attention)."""
        if role in AFTER_SILU and self.silu_offset:
            return "unsigned", "silu"
        return scheme, "zero" if scheme == "unsigned" else self.other_offset

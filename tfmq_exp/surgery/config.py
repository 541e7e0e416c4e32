"""Quantization configuration: bits for every role of a layer and exceptions by name, scales, and how ranges are trained."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, Literal

from tfmq_exp.core.records import encode
from tfmq_exp.core.validate import Checked
from tfmq_exp.denoisers.structure import TEMPORAL_ROLES, LayerInfo, Role
from tfmq_exp.quant.observers import Observer
from tfmq_exp.quant.qat_functions import QATQuantizeFn
from tfmq_exp.quant.qat_quantizers import Offset
from tfmq_exp.quant.scales.base import ScaleConfig
from tfmq_exp.quant.scales.dynamic import DynamicConfig, DynamicGeneratorConfig
from tfmq_exp.quant.scales.generator import Frequency, Normalised, RandomFourier
from tfmq_exp.quant.scales.observed_ranges import PerStepConfig, StaticConfig, TimestepGroupConfig
from tfmq_exp.quant.spec import QuantSpec, Scheme
from tfmq_exp.quant.timestep_context import OutsideTimesteps

WEIGHT_BITS = range(2, 9)
INPUT_BITS = range(4, 9)
QAT_INPUT_BITS = range(2, 9)  # ranges that are trained serve fewer levels than observed ones
PROBABILITY_BITS = range(4, 17)
# Inputs of these layers come from SiLU: convolutions of residual blocks, embedding projections, the last layer.
AFTER_SILU = frozenset({Role.RES_CONV, Role.TIME_PROJ, Role.HEAD})
# Of a stored model: what is left after learning, and the encodings of networks that stay.
STORED_SCALES = (
    *(StaticConfig, PerStepConfig, TimestepGroupConfig, DynamicConfig, DynamicGeneratorConfig),
    *(Frequency, Normalised, RandomFourier),
)

Bits = int | Sequence[int]  # several activation widths: which acts is chosen per sampling step


def widths(bits: Bits | None) -> tuple[int, ...]:
    """One width or several as a tuple, empty for float."""
    return () if bits is None else tuple(bits) if isinstance(bits, Sequence) else (bits,)


def check_bits(bits: Bits | None, allowed: range, name: str) -> None:
    """Raise ValueError unless `bits` is None (float) or allowed."""
    found = widths(bits)
    for b in found:
        if type(b) is not int or b not in allowed:
            raise ValueError(f"{name} bits must be {allowed[0]} to {allowed[-1]} or null (float), got {b!r}")
    if bits is not None and (not found or len(set(found)) < len(found)):
        raise ValueError(f"several {name} bits must be different ones, and null for float, got {bits!r}")


@dataclass(frozen=True)
class SchemeConfig(Checked):
    """Schemes of weights and activations; weights have a range per output `channel`, or one per `tensor` (PTQD's release).

    `deployable` weights are what an integer engine executes exactly: 8 bits symmetric (an asymmetric code minus its zero point
    would need 9 bits), fewer asymmetric with a zero point inside the integers.
    """

    weights: Literal["deployable", "affine", "symmetric"] = "deployable"
    granularity: Literal["channel", "tensor"] = "channel"
    activations: Literal["affine", "symmetric"] = "affine"

    def weight(self, bits: int | None) -> QuantSpec | None:
        """Spec of a weight."""
        if bits is None:
            return None
        scheme = self.weights
        if scheme == "deployable":
            scheme = "symmetric" if bits == 8 else "affine"
        return QuantSpec(bits, scheme, axis=0 if self.granularity == "channel" else None)


@dataclass(frozen=True)
class LayerBits:
    """Bits of a layer's weight, of its input and of its output; None stays float."""

    weight: int | None = None
    input: Bits | None = None
    output: Bits | None = None

    @classmethod
    def of(cls, given: Any, key: str) -> "LayerBits":
        """Bits from plain data: a mapping, or None for a layer that stays float altogether; `key` is its place, for errors."""
        if isinstance(given, LayerBits):
            return given
        known = {} if given is None else given
        if not isinstance(known, Mapping) or set(known) - {"weight", "input", "output"}:
            expected = "null (all float) or bits such as {weight: 8, input: null}"
            raise ValueError(f"method.surgery.{key} must be {expected}, got {given!r}")
        return cls(**known)


@dataclass(frozen=True)
class AttentionBits:
    """Bits of the operands of attention's two matrix products: query, key and value; softmax probabilities."""

    operands: int | None = None
    probabilities: int | None = None


@dataclass(frozen=True)
class QATConfig(Checked):
    """Quantizers of one method of quantization-aware training.

    Args:
        activations: function of activations.
        weights: function of weights. Their ranges are initialized by the method's `weight_observer`.
        range_init: initializes activation ranges.
        silu_offset: outputs of SiLU have an unsigned range that starts at SiLU's minimum. Padding is 0, outside such a range.
        other_offset: symmetric ranges lie about `zero`, or about a number that is `learned`.
    """

    activations: QATQuantizeFn
    weights: QATQuantizeFn
    range_init: Observer
    silu_offset: bool = False
    other_offset: Literal["zero", "learned"] = "zero"

    def __post_init__(self) -> None:
        super().__post_init__()
        if "gamma" in self.activations.extra_params():
            raise ValueError("an activation's interval cannot be bent by gamma: learn_gamma is for weights")

    def offset(self, role: Role | None, scheme: Scheme) -> tuple[Scheme, Offset]:
        """Scheme and offset of an input of a layer with this role (None: an operand of attention)."""
        if role in AFTER_SILU and self.silu_offset:
            return "unsigned", "silu"
        return scheme, "zero" if scheme == "unsigned" else self.other_offset


@dataclass(frozen=True)
class QuantizationConfig(Checked):
    """Bits for every role, and exceptions for layers by name.

    Args:
        roles: every role of `Role` by its value, so that the file that holds the configuration says everything.
        attention: bits of attention's operands.
        sites: shell patterns of layer names -> bits of those layers, later patterns win; each must match something.
        grids: schemes.
        split_shortcuts: give trunk and skip channels of every shortcut separate quantizers (Q-Diffusion).
        tie_qkv: one input quantizer for q, k and v of an attention, as where the original network has them in one layer
            (unconditional LDM). Observed ranges are the same either way; learned scales are not.
        outside_timesteps: what a timestep outside the calibrated finite set does: `error`, or `nearest`, which reads the
            scales and stored features of the nearest one, so that a network calibrated with 20 steps can be sampled with 50.
        qat: how ranges and weights are trained, for methods of quantization-aware training; None for all others.
    """

    roles: Mapping[str, LayerBits]
    attention: AttentionBits = field(default_factory=AttentionBits)
    sites: Mapping[str, LayerBits] = field(default_factory=dict)
    grids: SchemeConfig = field(default_factory=SchemeConfig)
    split_shortcuts: bool = False
    tie_qkv: bool = False
    outside_timesteps: OutsideTimesteps = "error"
    qat: QATConfig | None = None

    def __post_init__(self) -> None:
        named: dict[str, LayerBits] = {}
        for group in ("roles", "sites"):  # YAML gives plain mappings
            bits = {k: LayerBits.of(v, f"{group}.{k}") for k, v in getattr(self, group).items()}
            object.__setattr__(self, group, bits)
            named |= {f"{group}.{name}": value for name, value in bits.items()}
        if wrong := set(self.roles).symmetric_difference(role.value for role in Role):
            raise ValueError(f"method.surgery.roles names every role; wrong or missing: {', '.join(sorted(wrong))}")
        super().__post_init__()
        inputs = QAT_INPUT_BITS if self.qat else INPUT_BITS
        for name, bits in named.items():
            if not (bits.weight is None or type(bits.weight) is int):
                raise ValueError(f"{name}.weight must be one number of bits, or null (float), got {bits.weight!r}")
            check_bits(bits.weight, WEIGHT_BITS, f"{name}.weight: weight")
            check_bits(bits.input, inputs, f"{name}.input: activation")
            check_bits(bits.output, inputs, f"{name}.output: activation")
        check_bits(self.attention.operands, inputs, "attention.operands: attention operand")
        check_bits(self.attention.probabilities, PROBABILITY_BITS, "attention.probabilities: attention probability")
        for name in ("weights", "activations") if self.qat else ():
            if getattr(self.grids, name) != "symmetric":
                raise ValueError(f"QAT quantizers need grids.{name} symmetric, got {getattr(self.grids, name)!r}")

    def bits_of(self, layer: LayerInfo) -> LayerBits:
        """Bits of one layer."""
        matching = [bits for pattern, bits in self.sites.items() if fnmatchcase(layer.name, pattern)]
        return matching[-1] if matching else self.roles[layer.role.value]


@dataclass(frozen=True)
class ScalePlan:
    """Scales of the Temporal Information Block's activations, and of all others."""

    temporal: ScaleConfig
    default: ScaleConfig

    def __post_init__(self) -> None:
        for name, scale in vars(self).items():
            if not isinstance(scale, ScaleConfig):
                raise ValueError(f"scales.{name} must be a ScaleConfig, such as StaticConfig, got {scale!r}")
            encode(scale.tabulated(), STORED_SCALES)  # refuse what could not be stored before anything is computed

    def of(self, role: Role | None) -> ScaleConfig:
        """Scale config of a layer with this role (None: attention's operands)."""
        return self.temporal if role in TEMPORAL_ROLES else self.default

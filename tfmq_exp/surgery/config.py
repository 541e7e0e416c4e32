"""Quantization configuration: bits for every role of a layer, and exceptions by name."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, Literal, get_args

from tfmq_exp.core.validate import SWITCH, check_fields, one_of
from tfmq_exp.denoisers.structure import LayerInfo, Role
from tfmq_exp.quant.spec import QuantSpec
from tfmq_exp.quant.timestep_context import OutsideTimesteps
from tfmq_exp.surgery.qat_config import QATConfig

WEIGHT_BITS = range(2, 9)
INPUT_BITS = range(4, 9)
QAT_INPUT_BITS = range(2, 9)  # ranges that are trained serve fewer levels than observed ones
PROBABILITY_BITS = range(4, 17)

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
class SchemeConfig:
    """Schemes of weights and activations.

    Args:
        weights: `deployable` is what an integer engine executes exactly: 8 bits symmetric (an asymmetric code minus its zero
            point would need 9 bits), fewer asymmetric with a zero point inside the integers. Or `affine`, `symmetric` always.
        granularity: weights have a range per output `channel`, or one per `tensor` (PTQD's release).
        activations: `affine`, or `symmetric` (some recipes of Q-Diffusion's release).
    """

    weights: Literal["deployable", "affine", "symmetric"] = "deployable"
    granularity: Literal["channel", "tensor"] = "channel"
    activations: Literal["affine", "symmetric"] = "affine"

    def __post_init__(self) -> None:
        check_fields(self, weights=one_of("deployable", "affine", "symmetric"))
        check_fields(self, granularity=one_of("channel", "tensor"), activations=one_of("affine", "symmetric"))

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


def as_layer_bits(given: Any, key: str) -> LayerBits:
    """Bits from plain data: a mapping, or None for a layer that stays float altogether; `key` is its place, for errors."""
    if isinstance(given, LayerBits):
        return given
    known = {} if given is None else given
    if not isinstance(known, Mapping) or set(known) - {"weight", "input", "output"}:
        raise ValueError(
            f"method.surgery.{key} must be null (all float) or bits such as {{weight: 8, input: null}}, got {given!r}"
        )
    return LayerBits(**known)


@dataclass(frozen=True)
class AttentionBits:
    """Bits of the operands of attention's two matrix products: query, key and value; softmax probabilities."""

    operands: int | None = None
    probabilities: int | None = None


@dataclass(frozen=True)
class QuantizationConfig:
    """Bits for every role, and exceptions for layers by name.

    Args:
        roles: every role of `Role` by its value; a role that is missing or unknown is an error, so the file that holds the
            configuration says everything.
        attention: bits of attention's operands.
        sites: shell patterns of layer names -> bits of those layers, later patterns win; one that matches nothing is an
            error.
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
        for group in ("roles", "sites"):  # YAML gives plain mappings
            bits = {k: as_layer_bits(v, f"{group}.{k}") for k, v in getattr(self, group).items()}
            object.__setattr__(self, group, bits)
        wrong = set(self.roles).symmetric_difference(role.value for role in Role)
        if wrong:
            raise ValueError(
                f"method.surgery.roles names every role once; wrong or missing: {', '.join(sorted(wrong))}"
            )
        outside = one_of(*get_args(OutsideTimesteps))
        check_fields(self, split_shortcuts=SWITCH, tie_qkv=SWITCH, outside_timesteps=outside)
        inputs = QAT_INPUT_BITS if self.qat else INPUT_BITS
        named = {f"{group}.{name}": bits for group in ("roles", "sites") for name, bits in getattr(self, group).items()}
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

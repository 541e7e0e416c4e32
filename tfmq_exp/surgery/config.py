"""What becomes integer: a plan by role, resolved into a table with one line per layer."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import Any, Literal

from tfmq_exp.core.validate import SWITCH, check_fields
from tfmq_exp.denoisers.structure import LayerInfo, Role, UNetStructure
from tfmq_exp.quant.qat.base import QATQuantizeFn
from tfmq_exp.quant.spec import QuantSpec, Scheme
from tfmq_exp.surgery.qat_config import QATConfig
from tfmq_exp.surgery.scales import Scale, ScalePlan, scale_from_json, scale_to_json

WEIGHT_BITS = range(2, 9)
INPUT_BITS = range(4, 9)
TRAINED_INPUT_BITS = range(2, 9)  # fewer levels than a range alone can place
PROBABILITY_BITS = range(4, 17)
OPERANDS = ("query", "key", "value")  # and "probabilities"

Bits = int | Sequence[int]  # several activation widths: which acts is chosen per sampling step


def checked(bits: Bits | None, allowed: range, what: str) -> None:
    """Raise ValueError unless `bits` is None (float) or allowed."""
    found = widths(bits)
    for b in found:
        if type(b) is not int or b not in allowed:
            raise ValueError(f"{what} bits must be {allowed[0]} to {allowed[-1]} or null (float), got {b!r}")
    if bits is not None and (not found or len(set(found)) < len(found)):
        raise ValueError(f"several {what} bits must be different ones, and null for float, got {bits!r}")


def widths(bits: Bits | None) -> tuple[int, ...]:
    """One width or several as a tuple, empty for float."""
    return () if bits is None else tuple(bits) if isinstance(bits, Sequence) else (bits,)


@dataclass(frozen=True)
class SchemeConfig:
    """Kinds of grids.

    Args:
        weights: `deployable` is what an integer engine executes exactly: 8 bits symmetric (an asymmetric code minus its zero
            point would need 9 bits), fewer asymmetric with a zero point inside the grid. Or `affine`, `symmetric` always.
        per: weights have a range per output `channel`, or one per `tensor` (PTQD's release).
        activations: `affine`, or `symmetric` (some recipes of Q-Diffusion's release).
    """

    weights: Literal["deployable", "affine", "symmetric"] = "deployable"
    per: Literal["channel", "tensor"] = "channel"
    activations: Literal["affine", "symmetric"] = "affine"

    def __post_init__(self) -> None:
        allowed = {
            "weights": ("deployable", "affine", "symmetric"),
            "per": ("channel", "tensor"),
            "activations": ("affine", "symmetric"),
        }
        for name, values in allowed.items():
            if getattr(self, name) not in values:
                raise ValueError(f"grids.{name} must be one of {', '.join(values)}, got {getattr(self, name)!r}")

    def weight(self, bits: int | None) -> QuantSpec | None:
        """The grid of a weight."""
        if bits is None:
            return None
        scheme = self.weights
        if scheme == "deployable":
            scheme = "symmetric" if bits == 8 else "affine"
        return QuantSpec(bits, scheme, axis=0 if self.per == "channel" else None)


@dataclass(frozen=True)
class LayerBits:
    """Bits of a layer's weight, of its input and of its output; None stays float."""

    weight: int | None = None
    input: Bits | None = None
    output: Bits | None = None


def as_layer_bits(given: Any, key: str) -> LayerBits:
    """A plan from plain data: a mapping of bits, or None for a layer that stays float altogether.

    Args:
        given: that, or a plan already.
        key: where it stands, for errors.

    Raises:
        ValueError: something else.
    """
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
class ActivationConfig:
    """One quantized activation: its grid, or several to choose from step by step, and its scale."""

    specs: tuple[QuantSpec, ...]
    scale: Scale

    def merged(self) -> "ActivationConfig":
        """As it is once calibration and learning are over."""
        return ActivationConfig(self.specs, self.scale.merged())


@dataclass(frozen=True)
class LayerConfig:
    """One line of the table: what happens to one layer. `split` channels come from the trunk, the rest from the skip."""

    weight: QuantSpec | None
    input: ActivationConfig | None
    output: ActivationConfig | None = None
    split: int | None = None


@dataclass(frozen=True)
class ResolvedConfig:
    """The whole table: every quantized layer by name, attention's operands by the attention's name, and the finite set.

    `tied` are layers with one input, whose input quantizers learn together; `trained` is the form of weights that are trained
    on their grids. Both are of no importance once learning is over.
    """

    sites: Mapping[str, LayerConfig]
    operands: Mapping[str, Mapping[str, ActivationConfig]]
    timesteps: tuple[int, ...]
    tied: tuple[tuple[str, ...], ...] = ()
    trained: QATQuantizeFn | None = None

    def merged(self) -> "ResolvedConfig":
        """As it is once calibration and learning are over."""

        def line(plan: ActivationConfig | None) -> ActivationConfig | None:
            return plan.merged() if plan else None

        sites = {
            name: LayerConfig(site.weight, line(site.input), line(site.output), site.split)
            for name, site in self.sites.items()
        }
        operands = {name: {k: v.merged() for k, v in parts.items()} for name, parts in self.operands.items()}
        return ResolvedConfig(sites, operands, self.timesteps)


@dataclass(frozen=True)
class QuantizationConfig:
    """The policy: bits for every role, and exceptions for layers by name.

    Args:
        roles: every role of `Role` by its value; a role that is missing or unknown is an error, so the file that holds the
            plan says everything.
        attention: bits of attention's operands.
        sites: shell patterns of layer names -> plan of those layers, later patterns win; one that matches nothing is an
            error.
        grids: which kinds of grids.
        split_shortcuts: give trunk and skip channels of every shortcut grids of their own (Q-Diffusion).
        tie_qkv: one input quantizer for q, k and v of an attention, as where the original network has them in one layer
            (unconditional LDM). Observed ranges are the same either way; learned scales are not.
        forms: how ranges and weights are trained, for methods of quantization-aware training; None for all others.
    """

    roles: Mapping[str, LayerBits]
    attention: AttentionBits = field(default_factory=AttentionBits)
    sites: Mapping[str, LayerBits] = field(default_factory=dict)
    grids: SchemeConfig = field(default_factory=SchemeConfig)
    split_shortcuts: bool = False
    tie_qkv: bool = False
    forms: QATConfig | None = None

    def __post_init__(self) -> None:
        for name in ("roles", "sites"):  # YAML gives plain mappings
            plans = {k: as_layer_bits(v, f"{name}.{k}") for k, v in getattr(self, name).items()}
            object.__setattr__(self, name, plans)
        wrong = set(self.roles).symmetric_difference(role.value for role in Role)
        if wrong:
            raise ValueError(f"a surgery plan names every role once; wrong or missing: {', '.join(sorted(wrong))}")
        inputs = TRAINED_INPUT_BITS if self.forms else INPUT_BITS
        check_fields(self, split_shortcuts=SWITCH, tie_qkv=SWITCH)
        named = {f"{group}.{name}": plan for group in ("roles", "sites") for name, plan in getattr(self, group).items()}
        for name, plan in named.items():
            if not (plan.weight is None or type(plan.weight) is int):
                raise ValueError(f"{name}.weight: one number of bits, or null (float), is wanted, got {plan.weight!r}")
            checked(plan.weight, WEIGHT_BITS, f"{name}.weight: weight")
            checked(plan.input, inputs, f"{name}.input: activation")
            checked(plan.output, inputs, f"{name}.output: activation")
        checked(self.attention.operands, inputs, "attention.operands: attention operand")
        checked(self.attention.probabilities, PROBABILITY_BITS, "attention.probabilities: attention probability")
        for name in ("weights", "activations") if self.forms else ():
            if getattr(self.grids, name) != "symmetric":
                raise ValueError(f"trained forms need grids.{name} symmetric, got {getattr(self.grids, name)!r}")

    def at(self, site: LayerInfo) -> LayerBits:
        """The plan of one layer."""
        matching = [plan for pattern, plan in self.sites.items() if fnmatchcase(site.name, pattern)]
        return matching[-1] if matching else self.roles[site.role.value]

    def resolve(
        self, structure: UNetStructure, attentions: tuple[str, ...], scales: ScalePlan, timesteps: tuple[int, ...]
    ) -> ResolvedConfig:
        """The table for one network.

        Raises:
            ValueError: a pattern that matches no layer, or a plan that leaves everything float.
        """
        for pattern in self.sites:
            if not any(fnmatchcase(name, pattern) for name in structure.sites):
                near = get_close_matches(pattern, structure.sites, n=3, cutoff=0.3) or list(structure.sites)[:3]
                raise ValueError(
                    f"the pattern {pattern!r} in surgery.sites matches no layer; layers are called {', '.join(near)}, ..."
                )

        def activation(
            name: str, bits: Bits | None, role: Role | None, scheme: Scheme | None = None
        ) -> ActivationConfig | None:
            kind, scale = scheme or self.grids.activations, scales.of(role).seeded_for(name)
            if self.forms:
                kind, centre = self.forms.grid(role, kind)
                scale = self.forms.scale(scale, centre)
            specs = tuple(QuantSpec(b, kind) for b in widths(bits))
            return ActivationConfig(specs, scale) if specs else None

        table: dict[str, LayerConfig] = {}
        for name, site in structure.sites.items():
            plan = self.at(site)
            if plan.weight or plan.input or plan.output:
                table[name] = LayerConfig(
                    self.grids.weight(plan.weight),
                    activation(f"{name}.input", plan.input, site.role),
                    activation(f"{name}.output", plan.output, site.role),
                    site.split if self.split_shortcuts else None,
                )
        operands: dict[str, dict[str, ActivationConfig]] = {}
        for name in attentions:
            lines = {part: activation(f"{name}.{part}", self.attention.operands, None) for part in OPERANDS}
            lines["probabilities"] = activation(f"{name}.probabilities", self.attention.probabilities, None, "unsigned")
            if there := {part: line for part, line in lines.items() if line}:
                operands[name] = there
        if not table and not operands:
            raise ValueError("this plan quantizes nothing: every role is float")
        trained = self.forms.weights if self.forms else None
        return ResolvedConfig(table, operands, timesteps, self._tied(structure, table), trained)

    def _tied(self, structure: UNetStructure, table: Mapping[str, LayerConfig]) -> tuple[tuple[str, ...], ...]:
        """Layers whose input quantizers learn together: q, k and v of every attention."""
        if not self.tie_qkv:
            return ()
        if structure.by_role(Role.FEED_FORWARD):
            raise ValueError("tie_qkv is for networks without transformer blocks, whose q, k and v have one input")
        groups: dict[str, list[str]] = {}
        for site in structure.by_role(Role.ATTN_QKV):
            if site.name in table and table[site.name].input:
                groups.setdefault(site.name.rpartition(".")[0], []).append(site.name)
        return tuple(tuple(names) for names in groups.values())


def resolved_to_json(plan: ResolvedConfig) -> dict[str, Any]:
    """A merged plan as plain data."""

    def line(activation: ActivationConfig | None) -> dict[str, Any] | None:
        if activation is None:
            return None
        return {"specs": [asdict(spec) for spec in activation.specs], "scale": scale_to_json(activation.scale)}

    sites = {
        name: {
            "weight": asdict(site.weight) if site.weight else None,
            "input": line(site.input),
            "output": line(site.output),
            "split": site.split,
        }
        for name, site in plan.sites.items()
    }
    operands = {name: {part: line(a) for part, a in parts.items()} for name, parts in plan.operands.items()}
    return {"sites": sites, "operands": operands, "timesteps": list(plan.timesteps)}


def resolved_from_json(data: Mapping[str, Any]) -> ResolvedConfig:
    """The inverse of `resolved_to_json`."""

    def line(d: Mapping[str, Any]) -> ActivationConfig:
        return ActivationConfig(tuple(QuantSpec(**spec) for spec in d["specs"]), scale_from_json(d["scale"]))

    sites = {
        name: LayerConfig(
            QuantSpec(**site["weight"]) if site["weight"] else None,
            line(site["input"]) if site["input"] else None,
            line(site["output"]) if site["output"] else None,
            site["split"],
        )
        for name, site in data["sites"].items()
    }
    operands = {name: {part: line(a) for part, a in parts.items()} for name, parts in data["operands"].items()}
    return ResolvedConfig(sites, operands, tuple(data["timesteps"]))

"""What becomes integer: a plan by role, resolved into a table with one line per layer."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, Literal

from tfmq_exp.denoisers.anatomy import TEMPORAL_ROLES, Anatomy, Role, Site
from tfmq_exp.quant.spec import QuantSpec, Scheme

WEIGHT_BITS = range(2, 9)
INPUT_BITS = range(4, 9)
PROBABILITY_BITS = range(4, 17)


def checked(bits: int | None, allowed: range, what: str) -> None:
    """Raise ValueError unless `bits` is None (float) or allowed."""
    if bits is not None and bits not in allowed:
        raise ValueError(f"{what} bits must be {allowed[0]} to {allowed[-1]} or null (float), got {bits!r}")


def weight_spec(bits: int | None) -> QuantSpec | None:
    """The grid of a weight, one range per output channel, that an integer engine executes exactly.

    8 bits: symmetric (an asymmetric code minus its zero point would need 9 bits). Fewer: asymmetric with a zero point
    inside the grid, so that code - zero point is a signed 8-bit integer.
    """
    checked(bits, WEIGHT_BITS, "weight")
    if bits is None:
        return None
    return QuantSpec(bits, "symmetric" if bits == 8 else "affine", axis=0)


@dataclass(frozen=True)
class SitePlan:
    """Bits of a layer's weight and of its input; None stays float."""

    weight: int | None = None
    input: int | None = None


@dataclass(frozen=True)
class AttentionPlan:
    """Bits of the operands of attention's two matrix products: query, key and value; softmax probabilities."""

    operands: int | None = None
    probabilities: int | None = None


@dataclass(frozen=True)
class ScalePlan:
    """Where activation scales come from.

    Args:
        scope: which layers have one scale per sampling step, which is Finite Set Calibration (FSC): `temporal`, those
            of the Temporal Information Block (the paper, arXiv 2311.16503, section 4.3); `all` (its release); `none`.
        momentum: weight of the past in the running ranges.
    """

    scope: Literal["none", "temporal", "all"] = "none"
    momentum: float = 0.95

    def __post_init__(self) -> None:
        if self.scope not in ("none", "temporal", "all"):
            raise ValueError(f"scope must be none, temporal or all, got {self.scope!r}")

    def is_per_step(self, role: Role | None) -> bool:
        """Whether a layer of this role (None: attention's operands) has one scale per step."""
        return self.scope == "all" or (self.scope == "temporal" and role in TEMPORAL_ROLES)


@dataclass(frozen=True)
class InputPlan:
    """One activation quantizer: its grid and its scale source."""

    spec: QuantSpec
    per_step: bool
    momentum: float


@dataclass(frozen=True)
class ResolvedSite:
    """One line of the table: what happens to one layer."""

    weight: QuantSpec | None
    input: InputPlan | None


@dataclass(frozen=True)
class ResolvedPlan:
    """The whole table: every quantized layer by name, attention's operands by the attention's name, and the finite set."""

    sites: Mapping[str, ResolvedSite]
    operands: Mapping[str, Mapping[str, InputPlan]]
    timesteps: tuple[int, ...]


@dataclass(frozen=True)
class SurgeryPlan:
    """The policy: bits for every role, and exceptions for layers by name.

    Args:
        roles: every role of `Role` by its value; a role that is missing or unknown is an error, so the file that holds the
            plan says everything.
        sites: shell patterns of layer names -> plan of those layers, later patterns win; one that matches nothing is an
            error.
    """

    roles: Mapping[str, SitePlan]
    attention: AttentionPlan = field(default_factory=AttentionPlan)
    sites: Mapping[str, SitePlan] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("roles", "sites"):  # YAML gives plain mappings
            plans = {k: v if isinstance(v, SitePlan) else SitePlan(**v) for k, v in getattr(self, name).items()}
            object.__setattr__(self, name, plans)
        wrong = set(self.roles).symmetric_difference(role.value for role in Role)
        if wrong:
            raise ValueError(f"a surgery plan names every role once; wrong or missing: {', '.join(sorted(wrong))}")
        for plan in (*self.roles.values(), *self.sites.values()):
            checked(plan.weight, WEIGHT_BITS, "weight")
            checked(plan.input, INPUT_BITS, "activation")
        checked(self.attention.operands, INPUT_BITS, "attention operand")
        checked(self.attention.probabilities, PROBABILITY_BITS, "attention probability")

    def at(self, site: Site) -> SitePlan:
        """The plan of one layer."""
        matching = [plan for pattern, plan in self.sites.items() if fnmatchcase(site.name, pattern)]
        return matching[-1] if matching else self.roles[site.role.value]

    def resolve(
        self, anatomy: Anatomy, attentions: tuple[str, ...], scales: ScalePlan, timesteps: tuple[int, ...]
    ) -> ResolvedPlan:
        """The table for one network.

        Raises:
            ValueError: a pattern that matches no layer, or a plan that leaves everything float.
        """
        for pattern in self.sites:
            if not any(fnmatchcase(name, pattern) for name in anatomy.sites):
                raise ValueError(f"the pattern {pattern!r} in surgery.sites matches no layer")

        def source(bits: int, role: Role | None, scheme: Scheme = "affine") -> InputPlan:
            return InputPlan(QuantSpec(bits, scheme), scales.is_per_step(role), scales.momentum)

        table: dict[str, ResolvedSite] = {}
        for name, site in anatomy.sites.items():
            plan = self.at(site)
            if plan.weight or plan.input:
                table[name] = ResolvedSite(
                    weight_spec(plan.weight), source(plan.input, site.role) if plan.input else None
                )
        quantizers: dict[str, InputPlan] = {}
        if self.attention.operands:
            quantizers |= {part: source(self.attention.operands, None) for part in ("query", "key", "value")}
        if self.attention.probabilities:
            quantizers["probabilities"] = source(self.attention.probabilities, None, "unsigned")
        if not table and not quantizers:
            raise ValueError("this plan quantizes nothing: every role is float")
        return ResolvedPlan(table, {name: quantizers for name in attentions} if quantizers else {}, timesteps)


def resolved_from_json(data: Mapping[str, Any]) -> ResolvedPlan:
    """Read back `dataclasses.asdict(resolved plan)` after a trip through JSON."""

    def input_plan(d: Mapping[str, Any]) -> InputPlan:
        return InputPlan(QuantSpec(**d["spec"]), d["per_step"], d["momentum"])

    sites = {
        name: ResolvedSite(
            QuantSpec(**line["weight"]) if line["weight"] else None,
            input_plan(line["input"]) if line["input"] else None,
        )
        for name, line in data["sites"].items()
    }
    operands = {
        name: {part: input_plan(plan) for part, plan in parts.items()} for name, parts in data["operands"].items()
    }
    return ResolvedPlan(sites, operands, tuple(data["timesteps"]))

"""Grids of activations as integer engines have them: every quantizer becomes one record, whatever method has made it.

u = shrunk((x - offset) / scale)                                  x in steps, QIL's middle taken out
q = clamp(round(u) + zero point, lowest, highest)                 an integer, of which a byte holds all
x ~ gain scale (q - zero point) + offset                          what it stands for
"""

from dataclasses import astuple, dataclass, fields

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from tfmq_exp.deploy.weights import DoesNotFit, per_row
from tfmq_exp.quant.qat.duq import Duq
from tfmq_exp.quant.qat.lsq import Lsq
from tfmq_exp.quant.qat.qil import Qil
from tfmq_exp.quant.quantizers.affine import AffineQuantizer
from tfmq_exp.quant.quantizers.step_switch import StepSwitch
from tfmq_exp.quant.quantizers.trainable import TrainableQuantizer
from tfmq_exp.quant.scales.dynamic import DynamicScale
from tfmq_exp.quant.scales.dynamic_generator import DynamicGeneratorScale
from tfmq_exp.quant.scales.per_step import PerStepScale
from tfmq_exp.quant.scales.static import StaticScale
from tfmq_exp.quant.scales.timestep_groups import TimestepGroupScale
from tfmq_exp.quant.spec import QuantSpec

BYTE_VALUES = 256
# How each form's own numbers, by the names that it trains them under, stand in a `Rule`.
FORMS: dict[type, set[str]] = {Lsq: set(), Duq: {"gain"}, Qil: {"pruned"}}


@dataclass(frozen=True)
class Rule:
    """What of a grid is the same for every tensor.

    Args:
        lowest, highest: of the integers.
        gain: what one code stands for, in units of the step that codes are made with; not 1 with DuQ.
        offset: what the grid is centred on; not 0 behind SiLU and about learned centres.
        pruned: the share of the highest code below which magnitudes become 0, while the rest is stretched over all codes; not 0
            with QIL.
    """

    lowest: float
    highest: float
    gain: float = 1.0
    offset: float = 0.0
    pruned: float = 0.0


@dataclass(frozen=True)
class StepGrid:
    """Grids with an entry for every sampling step, or for every row of a batch. Fields after the zero point: see `Rule`."""

    scale: Float[Tensor, "entries"]
    zero_point: Float[Tensor, "entries"]
    lowest: Float[Tensor, "entries"]
    highest: Float[Tensor, "entries"]
    gain: Float[Tensor, "entries"]
    offset: Float[Tensor, "entries"]
    pruned: Float[Tensor, "entries"]

    @property
    def parts(self) -> tuple[Tensor, ...]:
        """All of its numbers."""
        return tuple(getattr(self, one.name) for one in fields(self))

    @property
    def static(self) -> bool:
        """Whether all entries are the same."""
        return all(bool((part == part[0]).all()) for part in self.parts)

    @property
    def width(self) -> int:
        """How many integers lie between the ends of the widest grid, both included."""
        return int((self.highest.max() - self.lowest.min()).item()) + 1

    @property
    def centre(self) -> int:
        """The zero point that the engine has at all steps; what a step's own differs by is added outside its core."""
        return int(self.zero_point.median().item())

    @property
    def unit(self) -> Float[Tensor, "entries"]:
        """What one code stands for."""
        return self.scale * self.gain

    @property
    def dead(self) -> Float[Tensor, "entries"]:
        """How many steps on each side of zero become 0."""
        return self.pruned * self.highest

    def check_bytes(self) -> None:
        """Raise DoesNotFit unless a byte holds every code, and zero is one of them."""
        if self.width > BYTE_VALUES:
            raise DoesNotFit(f"activations on a grid of {self.width} integers; a byte has {BYTE_VALUES}")
        if not bool((self.zero_point == self.zero_point.round()).all()):
            raise DoesNotFit("an activation zero point is no integer")
        outside = (self.zero_point < self.lowest) | (self.zero_point > self.highest)
        if bool(outside.any()):
            raise DoesNotFit(f"an activation zero point of {self.zero_point[outside][0]:g} lies outside its grid")

    def taken(self, entries: Int[Tensor, "new"]) -> "StepGrid":
        """Some entries, in the order of their indices."""
        return StepGrid(*(part[entries] for part in self.parts))

    def of_rows(self, x: Float[Tensor, "batch *rest"], steps: Int[Tensor, "batch"]) -> "StepGrid":
        """An entry for every row of `x`, given at which step it is."""
        return self.taken(steps)

    def placed(self, x: Float[Tensor, "entries *rest"]) -> Float[Tensor, "entries *rest"]:
        """u: every row in steps of its entry, by the simulation's own operations; in the precision of `x`."""
        if bool(self.offset.any()):
            x = x - per_row(self.offset.to(x), x.dim())
        u = x / per_row(self.scale.to(x), x.dim())
        if not bool(self.pruned.any()):
            return u
        dead, pruned = (per_row(part.to(x), x.dim()) for part in (self.dead, self.pruned))
        return (u - u.clamp(-dead, dead)) / (1 - pruned)

    def codes(self, x: Float[Tensor, "entries *rest"]) -> Float[Tensor, "entries *rest"]:
        """q, as floats: bit by bit those of the simulation."""
        shifted = self.placed(x).round_().add_(per_row(self.zero_point, x.dim()))
        return shifted.clamp_(per_row(self.lowest, x.dim()), per_row(self.highest, x.dim()))

    def real(self, codes: Float[Tensor, "entries *rest"]) -> Float[Tensor, "entries *rest"]:
        """What codes stand for."""
        zero_point, unit, offset = (per_row(part, codes.dim()) for part in (self.zero_point, self.unit, self.offset))
        return (codes - zero_point) * unit + offset


@dataclass(frozen=True)
class LiveGrid:
    """Scale and zero point that follow from the tensor at hand: from its ends, or by a network from its statistics."""

    source: DynamicScale | DynamicGeneratorScale
    rule: Rule

    @property
    def spec(self) -> QuantSpec:
        """The grid without its rule."""
        return self.source.spec

    @property
    def width(self) -> int:
        """How many integers lie between its ends, both included."""
        return int(self.rule.highest - self.rule.lowest) + 1

    def check_bytes(self) -> None:
        """Raise DoesNotFit unless a byte holds every code."""
        if self.width > BYTE_VALUES:
            raise DoesNotFit(f"activations on a grid of {self.width} integers; a byte has {BYTE_VALUES}")

    @torch.no_grad()
    def of_rows(self, x: Float[Tensor, "batch *rest"], steps: Int[Tensor, "batch"]) -> StepGrid:
        """An entry for every row of `x`; the context of a source that reads the timestep must be at these steps."""
        found = [part.flatten().expand(len(x)) for part in self.source(x - self.rule.offset)]
        return ruled(found[0], found[1], self.rule)


Grid = StepGrid | LiveGrid


def ruled(scale: Float[Tensor, "entries"], zero_point: Float[Tensor, "entries"], rule: Rule) -> StepGrid:
    """The same rule for all entries."""
    return StepGrid(scale, zero_point, *(torch.full_like(scale, part) for part in astuple(rule)))


def rule_of(quantizer: AffineQuantizer) -> Rule:
    """What a quantizer does with x in steps.

    Raises:
        DoesNotFit: a form that makes its codes in a way that is not known here.
    """
    if not isinstance(quantizer, TrainableQuantizer):
        return Rule(quantizer.spec.qmin, quantizer.spec.qmax)
    fn, own = quantizer.fn.for_inference(), {name: value.item() for name, value in quantizer.extra.items()}
    if own.keys() != FORMS.get(type(fn)):
        known = ", ".join(kind.__name__ for kind in FORMS)
        named = f"{type(fn).__name__}({', '.join(own)})"
        raise DoesNotFit(f"activations under the form {named}, whose codes are not known; known are those of {known}")
    offset = 0.0 if quantizer.offset is None else quantizer.offset.item()
    return Rule(quantizer.ints.qmin, quantizer.ints.qmax, offset=offset, **own)


def step_grid(quantizer: AffineQuantizer, steps: int) -> StepGrid:
    """The merged table of a quantizer whose scales depend on the step at most.

    Raises:
        DoesNotFit: another kind of source, or of form.
    """
    source = quantizer.source
    if type(source) is StaticScale:
        entries = torch.zeros(steps, dtype=torch.long)
    elif type(source) in (PerStepScale, TimestepGroupScale):
        entries = source.entry_of_step.cpu()  # type: ignore[union-attr]
    else:
        raise DoesNotFit(f"scales of a {type(source).__name__} source are no table over sampling steps")
    scale, zero_point = source.scale.detach().cpu()[entries], source.zero_point.cpu()[entries]  # type: ignore[union-attr]
    return ruled(scale, zero_point, rule_of(quantizer))


def grid_of(quantizer: nn.Module, steps: int) -> Grid:
    """The grid behind one activation quantizer, or behind the one that each step has chosen.

    Raises:
        DoesNotFit: scales that can neither be tabulated nor computed from the tensor, or an unknown form.
    """
    if isinstance(quantizer, AffineQuantizer) and isinstance(quantizer.source, DynamicScale | DynamicGeneratorScale):
        return LiveGrid(quantizer.source, rule_of(quantizer))
    if isinstance(quantizer, AffineQuantizer):
        return step_grid(quantizer, steps)
    if isinstance(quantizer, StepSwitch):
        choices = [step_grid(choice, steps) for choice in quantizer.choices]  # type: ignore[arg-type]
        at, step = quantizer.at.cpu(), torch.arange(steps)
        return StepGrid(*(torch.stack(part)[at, step] for part in zip(*(c.parts for c in choices), strict=True)))
    raise DoesNotFit(f"a {type(quantizer).__name__} is no activation quantizer")

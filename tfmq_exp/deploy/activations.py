"""Grids of activations as an integer engine quantizes them: unsigned bytes, with a scale and zero point for every step."""

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from tfmq_exp.deploy.weights import DoesNotFit
from tfmq_exp.quant.quantizers.affine import AffineQuantizer
from tfmq_exp.quant.quantizers.step_switch import StepSwitch
from tfmq_exp.quant.sources.dynamic import Dynamic
from tfmq_exp.quant.sources.intervals import Intervals
from tfmq_exp.quant.sources.per_step import PerStep
from tfmq_exp.quant.sources.static import Static
from tfmq_exp.quant.spec import QuantSpec


@dataclass(frozen=True)
class StepGrid:
    """q = clamp(round(x / scale) + zero point, lowest, highest), with numbers of their own for every sampling step."""

    scale: Float[Tensor, "steps"]
    zero_point: Float[Tensor, "steps"]
    lowest: Float[Tensor, "steps"]
    highest: Float[Tensor, "steps"]

    @property
    def static(self) -> bool:
        """Whether all steps have the same."""
        parts = (self.scale, self.zero_point, self.lowest, self.highest)
        return all(bool((part == part[0]).all()) for part in parts)

    @property
    def width(self) -> int:
        """How many integers lie between the ends of the widest grid, both included."""
        return int((self.highest.max() - self.lowest.min()).item()) + 1

    @property
    def centre(self) -> int:
        """The zero point that the engine has at all steps; what a step's own differs by is added outside its core."""
        return int(self.zero_point.median().item())

    def check_bytes(self) -> None:
        """Raise DoesNotFit unless a byte holds every code, and zero is one of them."""
        if self.width > 256:
            raise DoesNotFit(f"activations on a grid of {self.width} integers; a byte has 256")
        if not bool((self.zero_point == self.zero_point.round()).all()):
            raise DoesNotFit("an activation zero point is no integer")
        outside = (self.zero_point < self.lowest) | (self.zero_point > self.highest)
        if bool(outside.any()):
            raise DoesNotFit(f"an activation zero point of {self.zero_point[outside][0]:g} lies outside its grid")


@dataclass(frozen=True)
class LiveGrid:
    """Min and max of the tensor at hand, for each row of the batch or for all of them."""

    spec: QuantSpec
    per: Literal["tensor", "sample"]

    def check_bytes(self) -> None:
        """Raise DoesNotFit unless a byte holds every code."""
        if self.spec.bits > 8:
            raise DoesNotFit(f"activations of {self.spec.bits} bits; a byte has 8")


Grid = StepGrid | LiveGrid


def step_grid(quantizer: AffineQuantizer, steps: int) -> StepGrid:
    """The merged table of a quantizer whose scales depend on the step at most.

    Raises:
        DoesNotFit: another kind of source.
    """
    source, spec = quantizer.source, quantizer.spec
    if type(source) is Static:
        entries = torch.zeros(steps, dtype=torch.long)
    elif type(source) in (PerStep, Intervals):
        entries = source.entry_of_step.cpu()  # type: ignore[union-attr]
    else:
        raise DoesNotFit(f"scales of a {type(source).__name__} source are no table over sampling steps")
    scale, zero_point = source.scale.detach().cpu()[entries], source.zero_point.cpu()[entries]  # type: ignore[union-attr]
    return StepGrid(scale, zero_point, torch.full((steps,), float(spec.qmin)), torch.full((steps,), float(spec.qmax)))


def grid_of(quantizer: nn.Module, steps: int) -> Grid:
    """The grid behind one activation quantizer, or behind the one that each step has chosen.

    Raises:
        DoesNotFit: scales that can neither be tabulated nor computed from the tensor's ends.
    """
    if isinstance(quantizer, AffineQuantizer) and isinstance(quantizer.source, Dynamic):
        return LiveGrid(quantizer.spec, quantizer.source.per)  # type: ignore[arg-type]
    if isinstance(quantizer, AffineQuantizer):
        return step_grid(quantizer, steps)
    if isinstance(quantizer, StepSwitch):
        choices = [step_grid(choice, steps) for choice in quantizer.choices]  # type: ignore[arg-type]
        at, step = quantizer.at.cpu(), torch.arange(steps)
        parts = ([getattr(c, name) for c in choices] for name in ("scale", "zero_point", "lowest", "highest"))
        return StepGrid(*(torch.stack(part)[at, step] for part in parts))
    raise DoesNotFit(f"a {type(quantizer).__name__} is no activation quantizer")

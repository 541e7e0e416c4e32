"""Quantization parameters of activations as integer engines need them, in one form for all quantizers and methods.

u = prune((x - offset) / scale)                             prune: QIL's interval around 0, otherwise the identity
q = clamp(round(u) + zero_point, lowest, highest)           integer that fits a byte
x ~ gain * scale * (q - zero_point) + offset                the real number that it represents
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from tfmq_exp.deploy.weight_tables import NotRepresentableError, per_row
from tfmq_exp.quant.qat_functions import Duq, Lsq, Qil
from tfmq_exp.quant.qat_quantizers import TrainableQuantizer
from tfmq_exp.quant.quantizers import AffineQuantizer, StepSwitch
from tfmq_exp.quant.scales.dynamic import DynamicGeneratorScale, DynamicScale

BYTE_VALUES = 256
# Inference quantizers of QAT, each with those of its trained numbers that `ScaleTable` has.
KNOWN_FORMS: dict[type, set[str]] = {Lsq: set(), Duq: {"gain"}, Qil: {"pruned"}}


class ScaleTable(NamedTuple):
    """Quantization parameters with an entry for every sampling step, or for every row of a batch.

    Args:
        scale, zero_point: of quantization.
        lowest, highest: range of the integers.
        gain: scale of dequantization over scale of quantization; 1 except for DuQ.
        offset: real number in the centre of the grid; 0 except after SiLU and for learned centres.
        pruned: share of the highest code below which magnitudes become 0, the rest being stretched over all codes; 0
            except for QIL.
    """

    scale: Float[Tensor, "entries"]
    zero_point: Float[Tensor, "entries"]
    lowest: Float[Tensor, "entries"]
    highest: Float[Tensor, "entries"]
    gain: Float[Tensor, "entries"]
    offset: Float[Tensor, "entries"]
    pruned: Float[Tensor, "entries"]

    @property
    def table(self) -> "ScaleTable":
        """Itself, as `RuntimeScale.table`."""
        return self

    @property
    def num_codes(self) -> int:
        return int((self.highest.max() - self.lowest.min()).item()) + 1

    @property
    def output_scale(self) -> Float[Tensor, "entries"]:
        """Scale of dequantization."""
        return self.scale * self.gain

    @property
    def dead_zone(self) -> Float[Tensor, "entries"]:
        """Magnitude, in units of the scale, below which values become 0."""
        return self.pruned * self.highest

    def select(self, entries: Int[Tensor, "new"]) -> "ScaleTable":
        return ScaleTable(*(column[entries] for column in self))

    def of_rows(self, x: Float[Tensor, "batch *rest"], steps: Int[Tensor, "batch"]) -> "ScaleTable":
        """An entry for every row of `x`, given the sampling step of each."""
        return self.select(steps)

    def scaled(self, x: Float[Tensor, "entries *rest"]) -> Float[Tensor, "entries *rest"]:
        """u, by the operations of the simulation, in the precision of `x`."""
        if bool(self.offset.any()):
            x = x - per_row(self.offset.to(x), x.dim())
        u = x / per_row(self.scale.to(x), x.dim())
        if not bool(self.pruned.any()):
            return u
        dead_zone, pruned = (per_row(column.to(x), x.dim()) for column in (self.dead_zone, self.pruned))
        return (u - u.clamp(-dead_zone, dead_zone)) / (1 - pruned)

    def codes(self, x: Float[Tensor, "entries *rest"]) -> Float[Tensor, "entries *rest"]:
        """Codes q as floats: bit by bit those of the simulation."""
        shifted = self.scaled(x).round_().add_(per_row(self.zero_point, x.dim()))
        return shifted.clamp_(per_row(self.lowest, x.dim()), per_row(self.highest, x.dim()))


@dataclass(frozen=True)
class RuntimeScale:
    """Scale and zero point computed from the tensor: from its range, or by a network from its statistics.

    Args:
        source: computes them.
        table: one entry with the other parameters, and the middle of the codes as zero point.
    """

    source: DynamicScale | DynamicGeneratorScale
    table: ScaleTable

    @torch.no_grad()
    def of_rows(self, x: Float[Tensor, "batch *rest"], steps: Int[Tensor, "batch"]) -> ScaleTable:
        """An entry for every row of `x`; the context of the model must be set to these steps."""
        scale, zero_point = (part.flatten().expand(len(x)) for part in self.source(x - self.table.offset.item()))
        return ScaleTable(scale, zero_point, *(column.to(scale.device).expand(len(x)) for column in self.table[2:]))


ActivationScale = ScaleTable | RuntimeScale


def varies(*columns: Tensor) -> bool:
    return any(bool((column != column[0]).any()) for column in columns)


def scale_table(quantizer: AffineQuantizer, scale: Tensor, zero_point: Tensor) -> ScaleTable:
    """Table with these scales and zero points, and the other parameters of a quantizer in every entry.

    Raises:
        NotRepresentableError: a QAT quantizer whose codes are computed by a formula that is not known here.
    """
    low, high, offset, trained = quantizer.spec.qmin, quantizer.spec.qmax, 0.0, dict[str, float]()
    if isinstance(quantizer, TrainableQuantizer):
        low, high, form = quantizer.ints.qmin, quantizer.ints.qmax, quantizer.fn.for_inference()
        offset = 0.0 if quantizer.offset is None else quantizer.offset.item()
        trained = {name: value.item() for name, value in quantizer.extra.items()}
        if trained.keys() != KNOWN_FORMS.get(type(form)):
            known = ", ".join(kind.__name__ for kind in KNOWN_FORMS)
            found = f"{type(form).__name__}({', '.join(trained)})"
            raise NotRepresentableError(f"codes of {found} are not known; known are those of {known}")
    values = (low, high, trained.get("gain", 1.0), offset, trained.get("pruned", 0.0))
    return ScaleTable(scale, zero_point, *(torch.full_like(scale, value) for value in values))


def activation_scale(quantizer: nn.Module, steps: int) -> ActivationScale:
    """Quantization parameters of one activation quantizer; of a `StepSwitch`, those of the quantizer chosen for each step.

    Raises:
        NotRepresentableError: bits chosen by step with scales of the tensor, or a QAT quantizer that is not known.
    """
    if isinstance(quantizer, StepSwitch):
        choices = [activation_scale(choice, steps) for choice in quantizer.choices]
        if not all(isinstance(choice, ScaleTable) for choice in choices):
            raise NotRepresentableError("bits are chosen by sampling step, but scales are computed from the tensor")
        columns = (torch.stack(column) for column in zip(*choices, strict=True))  # type: ignore[arg-type]
        return ScaleTable(*(column[quantizer.at, torch.arange(steps)] for column in columns))
    assert isinstance(quantizer, AffineQuantizer)
    source = quantizer.scale_provider
    if isinstance(source, DynamicScale | DynamicGeneratorScale):
        if isinstance(source, DynamicScale) and source.config.granularity == "token":
            raise NotRepresentableError("a range for every token is computed at run time")
        middle = source.spec.levels // 2 if source.spec.scheme == "affine" else 0
        return RuntimeScale(source, scale_table(quantizer, torch.ones(1), torch.full((1,), float(middle))))
    table = source.table()
    if table is None:
        raise NotRepresentableError(f"scales of a {type(source).__name__} source are no table over sampling steps")
    return scale_table(quantizer, *(column.detach() for column in table))


def check_bytes(scale: ScaleTable) -> None:
    """Raise NotRepresentableError unless a byte holds every code, and zero is one of them."""
    if scale.num_codes > BYTE_VALUES:
        raise NotRepresentableError(f"activations on a grid of {scale.num_codes} integers; a byte has {BYTE_VALUES}")
    if not bool((scale.zero_point == scale.zero_point.round()).all()):
        raise NotRepresentableError("an activation zero point is no integer")
    outside = scale.zero_point[(scale.zero_point < scale.lowest) | (scale.zero_point > scale.highest)]
    if len(outside):
        raise NotRepresentableError(f"an activation zero point of {outside[0]:g} lies outside its grid")

"""Scale providers: the scale and zero point of an activation, and their configurations.

A new one is a configuration and a module in this folder; a configuration that artefacts may hold stands in `STORED_SCALES`
of `surgery/config.py` as well.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Self

from jaxtyping import Float
from torch import Tensor, nn

from tfmq_exp.core.validate import Checked
from tfmq_exp.quant.observers import Observer
from tfmq_exp.quant.spec import IntRangeKind, QParams, QuantSpec
from tfmq_exp.quant.timestep_context import TimestepContext


class ScaleProvider(nn.Module):
    """Gives the scale and zero point for a tensor whose first dimension is the batch."""

    spec: QuantSpec
    needs_data: bool = True  # whether it has to `observe` calibration data
    per_step: bool = False  # whether every range belongs to one sampling step
    generates: bool = False  # whether `trainable` is a network, and not the scales themselves

    def observe(self, x: Float[Tensor, "batch *rest"]) -> None:
        """Take statistics from a calibration batch."""

    def forward(self, x: Float[Tensor, "batch *rest"]) -> QParams:
        """The parameters to quantize `x` with, broadcastable against it."""
        raise NotImplementedError

    def table(self) -> QParams | None:
        """Scale and zero point of every step of the finite set, shape [steps]; None where they depend on the tensor."""
        return None

    def uncalibrated(self) -> list[int]:
        """Entries that have had no data and cannot quantize."""
        return []

    def trainable(self) -> Iterator[nn.Parameter]:
        """Parameters that a method may learn."""
        return iter(())

    def clamp_parameters(self) -> None:
        """Called after every step of an optimiser on `trainable`."""

    def tabulated(self) -> "ScaleProvider":
        """An equal provider for sampling: what can be computed beforehand is a table."""
        return self


@dataclass(frozen=True, kw_only=True)
class ScaleConfig(Checked, ABC):
    """Configuration of a scale provider. Kinds that a stored model may have after learning have a `kind`, their name in files.

    The largest value of a range falls on the largest code of a QAT quantizer's `int_range`.
    """

    int_range: IntRangeKind = "full"

    @abstractmethod
    def build(self, spec: QuantSpec, context: TimestepContext) -> ScaleProvider:
        """A provider for one quantizer."""

    def tabulated(self) -> "ScaleConfig":
        """The configuration of `ScaleProvider.tabulated`, without settings of calibration and learning."""
        return self

    def seeded_for(self, name: str) -> Self:
        """A copy seeded from an activation's name (only generated scales use random numbers)."""
        return self

    def for_qat(self, init: Observer, kind: IntRangeKind) -> Self:
        """A copy for a QAT quantizer with this integer range, whose calibrated ranges are initialized by an observer."""
        return replace(self, int_range=kind)


def per_row(values: Float[Tensor, "rows"], x: Float[Tensor, "batch *rest"]) -> Float[Tensor, "rows ..."]:
    """One value for each row of `x` (or one for all), broadcastable against it."""
    return values.reshape(-1, *(1,) * (x.dim() - 1))

"""What a unit is fed while it learns."""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol

from tfmq_exp.quant.quantizers.base import Quantizer

Origin = Literal["quantized", "float"]


class UnitInputs(Protocol):
    """A policy: whose inputs are captured, how they become one batch, and what happens inside the unit meanwhile."""

    origins: ClassVar[tuple[Origin, ...]]

    def combine(self, captured: Mapping[Origin, Any]) -> Any:
        """One batch from what was captured."""
        ...

    def inside(self, quantizers: Sequence[Quantizer]) -> AbstractContextManager[None]:
        """In force while the unit learns; `quantizers` are those of its activations."""
        ...


class FromOneNetwork:
    """Inputs as they were captured, from one network."""

    origins: ClassVar[tuple[Origin, ...]]

    def combine(self, captured: Mapping[Origin, Any]) -> Any:
        """The captured batch itself."""
        return captured[self.origins[0]]

    def inside(self, quantizers: Sequence[Quantizer]) -> AbstractContextManager[None]:
        """Nothing special."""
        return nullcontext()


@dataclass(frozen=True)
class QuantizedInputs(FromOneNetwork):
    """What the part of the network that is already quantized gives the unit: it learns to repair errors before it."""

    origins: ClassVar[tuple[Origin, ...]] = ("quantized",)


@dataclass(frozen=True)
class FloatInputs(FromOneNetwork):
    """What the float network gives the unit; one pass captures many units (Q-Diffusion's learning of scales)."""

    origins: ClassVar[tuple[Origin, ...]] = ("float",)

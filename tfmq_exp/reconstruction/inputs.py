"""Inputs that a unit learns on: of the quantized network, of the float one, or of both at random (QDrop)."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from tfmq_exp.core.validate import SHARE, check_fields
from tfmq_exp.quant.quantizers.base import Quantizer

Origin = Literal["quantized", "float"]


class UnitInputs:
    """A choice of inputs: the networks in which they are captured, and how their batches become one."""

    origins: ClassVar[tuple[Origin, ...]]

    def combine(self, captured: Mapping[Origin, Any]) -> Any:
        """One batch of inputs from those captured in each network."""
        return captured[self.origins[0]]

    def learning_context(self, quantizers: Sequence[Quantizer]) -> AbstractContextManager[None]:
        """Context in which a unit with these activation quantizers learns."""
        return nullcontext()


@dataclass(frozen=True)
class QuantizedInputs(UnitInputs):
    """Inputs of the unit in the quantized network, so that it learns to repair the errors of earlier units."""

    origins = ("quantized",)


@dataclass(frozen=True)
class FloatInputs(UnitInputs):
    """Inputs of the unit in the float network, captured for many units in one pass (Q-Diffusion's learning of scales)."""

    origins = ("float",)


@dataclass(frozen=True)
class MixedInputs(UnitInputs):
    """QDrop (arXiv 2203.05740): elements of inputs, and of activations inside the unit, are quantized at random."""

    quant_prob: float = 0.5  # probability that an element is quantized, 0 to 1 (the release calls it `drop_prob`)
    origins = ("quantized", "float")

    def __post_init__(self) -> None:
        check_fields(self, quant_prob=SHARE)

    def combine(self, captured: Mapping[Origin, Any]) -> Any:
        return pytree.tree_map(self.mix, captured["quantized"], captured["float"])

    @contextmanager
    def learning_context(self, quantizers: Sequence[Quantizer]) -> Iterator[None]:
        with ExitStack() as hooks:
            for quantizer in quantizers:
                hook = quantizer.register_forward_hook(lambda _, args, output: self.mix(output, args[0]))
                hooks.enter_context(hook)
            yield

    def mix(self, quantized: Any, original: Any) -> Any:
        """Draw each element from one of two tensors; constants and integers (timesteps) are the same in both."""
        if not (isinstance(quantized, Tensor) and quantized.is_floating_point()):
            return quantized
        return torch.where(torch.rand_like(quantized) < self.quant_prob, quantized, original)

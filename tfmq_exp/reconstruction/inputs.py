"""Inputs that a unit learns on: of the quantized network, of the float one, or of both at random (QDrop)."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from tfmq_exp.core.validate import SHARE, check_fields
from tfmq_exp.quant.quantizers import Quantizer
from tfmq_exp.reconstruction.capture import hooks

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
    """QDrop (arXiv 2203.05740): elements of inputs, and of activations inside the unit, are quantized at random.

    Args:
        quant_prob: probability that an element is quantized, 0 to 1 (the release calls it `drop_prob`).
    """

    quant_prob: float = 0.5
    origins = ("quantized", "float")

    def __post_init__(self) -> None:
        check_fields(self, quant_prob=SHARE)

    def combine(self, captured: Mapping[Origin, Any]) -> Any:
        def mix(quantized: Any, original: Any) -> Any:
            return self.mix(quantized, original) if isinstance(quantized, Tensor) else quantized

        return pytree.tree_map(mix, captured["quantized"], captured["float"])

    @contextmanager
    def learning_context(self, quantizers: Sequence[Quantizer]) -> Iterator[None]:
        def hook(_: Quantizer, args: tuple[Tensor], output: Tensor) -> Tensor:
            return self.mix(output, args[0])

        with hooks([quantizer.register_forward_hook(hook) for quantizer in quantizers]):
            yield

    def mix(self, quantized: Tensor, original: Tensor) -> Tensor:
        """Draw each element from one of two tensors; integers (timesteps) are the same in both."""
        if not quantized.is_floating_point():
            return quantized
        return torch.where(torch.rand_like(quantized) < self.quant_prob, quantized, original)

"""QDrop: learn under randomly dropped activation quantization (Wei et al. 2022, arXiv 2203.05740)."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from tfmq_exp.core.validate import SHARE, check_fields
from tfmq_exp.quant.quantizers.base import Quantizer
from tfmq_exp.reconstruction.inputs import Origin


def mix(quantized: Tensor, original: Tensor, keep: float) -> Tensor:
    """Each element quantized with probability `keep`, else as it was; integers (timesteps) are the same in both."""
    if not quantized.is_floating_point():
        return quantized
    chosen = torch.rand_like(quantized) < keep
    return torch.where(chosen, quantized, original)


@dataclass(frozen=True)
class MixedInputs:
    """Inputs are drawn element by element from the quantized and the float network; so are activations inside the unit.

    Args:
        keep: probability that an element stays quantized (the release calls this number `drop_prob`).
    """

    keep: float = 0.5
    origins: ClassVar[tuple[Origin, ...]] = ("quantized", "float")

    def __post_init__(self) -> None:
        check_fields(self, keep=SHARE)

    def combine(self, captured: Mapping[Origin, Any]) -> Any:
        """A random mixture of both."""

        def leaf(quantized: Any, original: Any) -> Any:
            return mix(quantized, original, self.keep) if isinstance(quantized, Tensor) else quantized

        return pytree.tree_map(leaf, captured["quantized"], captured["float"])

    @contextmanager
    def inside(self, quantizers: Sequence[Quantizer]) -> Iterator[None]:
        """Every activation quantizer passes a random part of its input on unquantized."""

        def hook(_: Quantizer, args: tuple[Tensor], out: Tensor) -> Tensor:
            return mix(out, args[0], self.keep)

        handles = [quantizer.register_forward_hook(hook) for quantizer in quantizers]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

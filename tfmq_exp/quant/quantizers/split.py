"""Shortcut splitting: separate quantizers for trunk and skip channels (Q-Diffusion, arXiv 2302.04304, section 3.3)."""

from collections.abc import Sequence
from typing import Generic, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from tfmq_exp.quant.quantizers.base import Quantizer

Part = TypeVar("Part", bound=Quantizer)


class SplitQuantizer(nn.Module, Generic[Part]):
    """One quantizer for each group of consecutive channels; equal to a single one where their parameters are equal.

    Channels are dimension 1 both of activations and of a convolution's weight (its inputs), so this serves both. The
    parts keep their own modes.

    Args:
        parts: the quantizers.
        sizes: number of channels of each.
    """

    def __init__(self, parts: Sequence[Part], sizes: Sequence[int]) -> None:
        super().__init__()
        if len(parts) != len(sizes) or min(sizes) < 1:
            raise ValueError(f"{len(parts)} quantizers cannot share channels in groups of {tuple(sizes)}")
        self.parts, self.sizes = nn.ModuleList(parts), tuple(sizes)

    def pieces(self, x: Float[Tensor, "first channels *rest"]) -> list[tuple[Part, Tensor]]:
        """Every quantizer with its channels."""
        return list(zip(self.parts, x.split(self.sizes, dim=1), strict=True))  # type: ignore[arg-type]

    def forward(self, x: Float[Tensor, "first channels *rest"]) -> Float[Tensor, "first channels *rest"]:
        return torch.cat([part(piece) for part, piece in self.pieces(x)], dim=1)

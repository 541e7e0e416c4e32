"""What a quantizer is, and how its mode is set."""

from collections.abc import Generator, Iterable
from contextlib import contextmanager
from enum import Enum

from jaxtyping import Float
from torch import Tensor, nn


class Mode(Enum):
    """What a quantizer does with a tensor: nothing, look at it, or quantize it."""

    OFF = "off"
    OBSERVE = "observe"
    QUANTIZE = "quantize"


class Quantizer(nn.Module):
    """Passes a tensor through (OFF), learns its range on the way (OBSERVE), or puts it on a grid (QUANTIZE)."""

    mode: Mode = Mode.OFF

    def forward(self, x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """Act according to the mode; shape and dtype do not change."""
        if self.mode is Mode.QUANTIZE:
            return self.quantize(x)
        if self.mode is Mode.OBSERVE:
            self.observe(x)
        return x

    def observe(self, x: Float[Tensor, "*shape"]) -> None:
        """Learn the range of `x`."""
        raise NotImplementedError

    def quantize(self, x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """`x` on the grid."""
        raise NotImplementedError


@contextmanager
def modes(quantizers: Iterable[Quantizer], mode: Mode) -> Generator[None]:
    """Set the mode of some quantizers for the duration of a block; afterwards each is as it was."""
    before = [(quantizer, quantizer.mode) for quantizer in quantizers]
    try:
        for quantizer, _ in before:
            quantizer.mode = mode
        yield
    finally:
        for quantizer, was in before:
            quantizer.mode = was

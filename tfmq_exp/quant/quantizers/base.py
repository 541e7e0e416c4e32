"""Base class of quantizers, and their modes."""

from collections.abc import Generator, Iterable
from contextlib import contextmanager
from enum import Enum

from jaxtyping import Float
from torch import Tensor, nn


class Mode(Enum):
    """Pass a tensor through, observe it on the way, or quantize it."""

    OFF = "off"
    OBSERVE = "observe"
    QUANTIZE = "quantize"


class Quantizer(nn.Module):
    """Acts on a tensor according to its mode; shape and dtype do not change."""

    mode: Mode = Mode.OFF

    def forward(self, x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        if self.mode is Mode.QUANTIZE:
            return self.quantize(x)
        if self.mode is Mode.OBSERVE:
            self.observe(x)
        return x

    def observe(self, x: Float[Tensor, "*shape"]) -> None:
        """Take the range of `x` into account."""
        raise NotImplementedError

    def quantize(self, x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """Simulated quantization."""
        raise NotImplementedError


@contextmanager
def modes(quantizers: Iterable[Quantizer], mode: Mode) -> Generator[None]:
    """Set the mode of some quantizers for the duration of a block."""
    before = [(quantizer, quantizer.mode) for quantizer in quantizers]
    try:
        for quantizer, _ in before:
            quantizer.mode = mode
        yield
    finally:
        for quantizer, was in before:
            quantizer.mode = was

"""What every set of real images is to those who read it."""

from collections.abc import Iterator, Mapping
from typing import Any, Protocol

from jaxtyping import UInt8
from torch import Tensor


class ImageSource(Protocol):
    """Images of one size, in a fixed order."""

    def __len__(self) -> int:
        """How many."""
        ...

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height, width."""
        ...

    @property
    def identity(self) -> Mapping[str, Any]:
        """What identifies the images and how they were prepared, found without reading their pixels: plain JSON data."""
        ...

    def batches(self, size: int) -> Iterator[UInt8[Tensor, "batch channels height width"]]:
        """All of them, `size` at a time."""
        ...

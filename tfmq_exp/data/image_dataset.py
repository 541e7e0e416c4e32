"""Interface of sets of real images."""

from collections.abc import Iterator, Mapping
from typing import Any, Protocol

from jaxtyping import UInt8
from torch import Tensor


class ImageDataset(Protocol):
    """Images of one size, in a fixed order."""

    def __len__(self) -> int: ...

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height, width."""
        ...

    @property
    def identity(self) -> Mapping[str, Any]:
        """All that the images depend on, found without decoding them: plain JSON data."""
        ...

    def batches(self, size: int) -> Iterator[UInt8[Tensor, "batch channels height width"]]:
        """Read all images, `size` at a time."""
        ...

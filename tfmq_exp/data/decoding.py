"""From files of images to batches: decoded by a few threads, in order, without holding more than a few at a time."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import numpy as np
import torch
from jaxtyping import UInt8
from PIL import Image
from torch import Tensor

from tfmq_exp.data.preparation import Pixels, Preparation

WAITING = 64  # images that may be decoded ahead: enough for every thread, 13 MB at 256x256
Item = TypeVar("Item")


def decode(name: str, file: Path | BinaryIO, size: int, preparation: Preparation) -> Pixels:
    """One image as 8-bit RGB of `size` by `size`. Transparency and orientation tags are ignored, as training loaders do.

    Args:
        name: what errors call it.
        file: a path, or its bytes.
        size: of the result, in pixels.
        preparation: how it becomes a square.

    Raises:
        ValueError: damaged, no image, more than 8 bits per channel, or of another size after preparation.
    """
    try:
        with Image.open(file) as image:
            mode, rgb = image.mode, image.convert("RGB")
    except Exception as error:  # damaged bytes fail in whatever way they lead to
        raise ValueError(f"{name} cannot be read as an image ({type(error).__name__}: {error})") from error
    if mode.startswith(("I", "F")):
        raise ValueError(f"{name} has pixels of mode {mode}; expected 8 bits per channel")
    pixels = preparation(rgb, size)
    if pixels.shape != (size, size, 3):
        height, width = pixels.shape[:2]
        raise ValueError(
            f"{name} is {width}x{height} after {type(preparation).__name__}, expected {size}x{size}: images of one set "
            "have one size; choose a preparation that resizes, or their size"
        )
    return pixels


def in_order(function: Callable[[Item], Pixels], items: Iterable[Item]) -> Iterator[Pixels]:
    """The function of every item, computed by threads, in the order of the items."""
    with ThreadPoolExecutor() as pool:
        waiting: deque[Future[Pixels]] = deque()
        try:
            for item in items:
                waiting.append(pool.submit(function, item))
                if len(waiting) == WAITING:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


def check_batch(size: int) -> None:
    """ValueError for a batch without images."""
    if size < 1:
        raise ValueError(f"a batch holds at least one image, got {size}")


def stacked(images: Iterable[Pixels], size: int) -> Iterator[UInt8[Tensor, "batch channels height width"]]:
    """Images `size` at a time, channels first."""
    images = iter(images)
    while batch := list(islice(images, size)):
        yield torch.from_numpy(np.stack(batch)).permute(0, 3, 1, 2).contiguous()


def describe(preparation: Preparation) -> dict[str, Any]:
    """The name and settings of a preparation."""
    return {"name": type(preparation).__name__, **vars(preparation)}

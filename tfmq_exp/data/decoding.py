"""Decoding of image files into batches, by a few threads, in order, with few images in memory at a time."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from itertools import islice
from typing import Any, TypeVar

import numpy as np
import torch
from jaxtyping import UInt8
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from tfmq_exp.core.file_kind import HEAD, PICTURE, content_of
from tfmq_exp.data.preparation import MAX_PIXELS, Pixels, Preparation

WAITING = 64  # images that may be decoded ahead: enough for every thread, 13 MB at 256x256
# Formats of pictures, which Pillow decodes itself. Others start programs (PostScript) or are no pictures (GRIB, HDF5).
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF", "AVIF", "JPEG2000", "PPM", "QOI")
# 8 bits per channel, or fewer: the modes that Pillow turns into RGB without guessing a range
MODES = frozenset({"1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "LAB"})
Item = TypeVar("Item")


def decode(name: str, content: bytes, size: int, preparation: Preparation) -> Pixels:
    """Decode one image as 8-bit RGB of `size` by `size`; of an animation, or of several pages, the first.

    As training loaders do, transparency, orientation tags and colour profiles are ignored, and colours of 16 bits per
    channel keep their upper 8.

    Raises:
        ValueError: no picture, a damaged one, too large, of more than 8 bits per channel, or of another size once prepared.
    """
    rgb = to_rgb(name, content)
    try:
        pixels = preparation(rgb, size)
    except ValueError as error:
        raise ValueError(f"{name}, {rgb.width}x{rgb.height} pixels: {error}") from error
    height, width = pixels.shape[:2]
    if (height, width) != (size, size):
        found = f"{width}x{height} after {type(preparation).__name__}, expected {size}x{size}"
        advice = "images of one set have one size; choose a preparation that resizes, or their size"
        raise ValueError(f"{name} is {found}: {advice}")
    return pixels


def to_rgb(name: str, content: bytes) -> Image.Image:
    # a TGA's content has no mark of its own
    formats = (*FORMATS, "TGA") if name.lower().endswith(".tga") else FORMATS
    try:
        image = Image.open(BytesIO(content), formats=formats)
    except Image.DecompressionBombError as error:
        raise ValueError(f"{name} is too large to be decoded: at most {MAX_PIXELS} pixels ({error})") from error
    except Exception as error:  # damaged bytes can raise anything
        kind, reason = content_of(content[:HEAD]), f"{type(error).__name__}: {error}"
        if kind is not None:
            reason = "it begins as a picture, and is damaged" if kind == PICTURE else f"it {kind}"
        elif isinstance(error, UnidentifiedImageError):
            reason = f"no {', '.join(formats)}, or damaged"
        raise ValueError(f"{name} cannot be read as an image ({reason})") from error
    if image.width * image.height > MAX_PIXELS:
        found = f"{image.width}x{image.height}"
        raise ValueError(f"{name} is too large to be decoded: {found}, at most {MAX_PIXELS} pixels")
    if image.mode not in MODES:
        expected = "expected at most 8 bits per channel"
        raise ValueError(f"{name} has pixels of mode {image.mode}, of unknown range; {expected}")
    image.info.pop("transparency", None)  # of a palette, of which Pillow would warn
    try:
        return image.convert("RGB")
    except Exception as error:
        raise ValueError(f"{name} cannot be read as an image ({type(error).__name__}: {error})") from error


def in_order(function: Callable[[Item], Pixels], items: Iterable[Item]) -> Iterator[Pixels]:
    """Apply a function to every item in threads; results in the order of the items."""
    pool, remaining = ThreadPoolExecutor(), iter(items)
    try:
        waiting = deque(pool.submit(function, item) for item in islice(remaining, WAITING))
        while waiting:
            yield waiting.popleft().result()
            waiting.extend(pool.submit(function, item) for item in islice(remaining, 1))
    finally:
        pool.shutdown(cancel_futures=True)


def check_batch(size: int) -> None:
    """ValueError for a batch without images."""
    if size < 1:
        raise ValueError(f"a batch holds at least one image, got {size}")


def stacked(images: Iterable[Pixels], size: int) -> Iterator[UInt8[Tensor, "batch channels height width"]]:
    """Batches of `size` images, channels first; a ValueError at once for a size below 1."""
    check_batch(size)
    remaining = iter(images)
    batches = iter(lambda: list(islice(remaining, size)), [])
    return (torch.from_numpy(np.stack(batch)).permute(0, 3, 1, 2).contiguous() for batch in batches)


def describe(preparation: Preparation) -> dict[str, Any]:
    """The name and fields of a preparation, for identities."""
    return {"name": type(preparation).__name__, **vars(preparation)}

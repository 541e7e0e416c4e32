"""Preparation of an image as a square of bytes: each class is that of one training program, to the byte.

A Fréchet distance sees the differences, so real images are prepared as the network's training images were. Flips, which
training adds at random, are left out.
"""

from dataclasses import dataclass
from typing import Literal, Protocol, TypeAlias

import numpy as np
from jaxtyping import Float32, Int32, UInt8
from PIL import Image

from tfmq_exp.core.validate import check_fields, one_of

Interpolation = Literal["bilinear", "bicubic", "lanczos"]
Pixels: TypeAlias = UInt8[np.ndarray, "height width 3"]
FILTERS = {name: Image.Resampling[name.upper()] for name in ("bilinear", "bicubic", "lanczos")}
MAX_PIXELS = 89_478_485  # of an image, and of what it is enlarged to: Pillow's own limit, 268 MB of RGB
FIXED_POINT = 2048  # OpenCV's weights are multiples of 1/2048


class Preparation(Protocol):
    """Makes an RGB image `size` rows and columns; a frozen dataclass, because name and fields are part of identities."""

    def __call__(self, image: Image.Image, size: int) -> Pixels: ...


def crop_centre(pixels: Pixels, size: int) -> Pixels:
    """The middle square. Where the margin is odd, its larger part is cut from the bottom or the right."""
    top, left = ((length - size) // 2 for length in pixels.shape[:2])
    return pixels[top : top + size, left : left + size]


def check_enlarged(width: int, height: int) -> tuple[int, int]:
    """Return a size; ValueError for that of an image so narrow that it fills the memory once its short side is resized."""
    if width * height > MAX_PIXELS:
        raise ValueError(f"its short side resized, it would have {width}x{height}; at most {MAX_PIXELS} pixels")
    return width, height


@dataclass(frozen=True)
class CropThenResize:
    """LSUN in latent-diffusion (`ldm/data/lsun.py`): the middle square of the short side's length, resized by Pillow."""

    interpolation: Interpolation = "bicubic"

    def __post_init__(self) -> None:
        check_fields(self, interpolation=one_of(*FILTERS))

    def __call__(self, image: Image.Image, size: int) -> Pixels:
        square = Image.fromarray(crop_centre(np.asarray(image), min(image.size)))
        return np.asarray(square.resize((size, size), FILTERS[self.interpolation]))


@dataclass(frozen=True)
class ResizeThenCrop:
    """The short side resized to `size` by Pillow, then the middle square.

    As `Resize` and `CenterCrop` of torchvision, which torch-fidelity applies under `samples_resize_and_crop`: the long side
    is rounded down, and half of an odd margin is rounded to even.
    """

    interpolation: Interpolation = "bilinear"

    def __post_init__(self) -> None:
        check_fields(self, interpolation=one_of(*FILTERS))

    def __call__(self, image: Image.Image, size: int) -> Pixels:
        short = min(image.size)
        width, height = check_enlarged(*(int(size * length / short) for length in image.size))
        resized = image if short == size else image.resize((width, height), FILTERS[self.interpolation])
        top, left = round((height - size) / 2), round((width - size) / 2)
        return np.asarray(resized)[top : top + size, left : left + size]


@dataclass(frozen=True)
class HalveThenResizeThenCrop:
    """ImageNet in guided-diffusion (`center_crop_arr` of `guided_diffusion/image_datasets.py`).

    Averages of 2x2 pixels while both sides stay at least `size`, a bicubic resize of the short side, the middle square.
    """

    def __call__(self, image: Image.Image, size: int) -> Pixels:
        while min(image.size) >= 2 * size:
            image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
        scale = size / min(image.size)
        shape = check_enlarged(round(image.width * scale), round(image.height * scale))
        return crop_centre(np.asarray(image.resize(shape, Image.Resampling.BICUBIC)), size)


@dataclass(frozen=True)
class AliasedResizeThenCrop:
    """Faces in taming-transformers and latent-diffusion: two-by-two interpolation without a filter, then the middle square.

    As `SmallestMaxSize` and `CenterCrop` of albumentations in taming-transformers (`taming/data/base.py`), which resize by
    OpenCV's INTER_LINEAR. From 1024 to 256 pixels each becomes the mean of 4 of the 16 that it covers.
    """

    def __call__(self, image: Image.Image, size: int) -> Pixels:
        scale, pixels = size / min(image.size), np.asarray(image)
        if scale != 1:
            width, height = check_enlarged(round(image.width * scale), round(image.height * scale))
            pixels = resize_as_opencv(pixels, height, width)
        return crop_centre(pixels, size)


@dataclass(frozen=True)
class Unchanged:
    """The pixels as they are, of images that were prepared before; the dataset then checks their size."""

    def __call__(self, image: Image.Image, size: int) -> Pixels:
        return np.asarray(image)


def resize_as_opencv(pixels: Pixels, height: int, width: int) -> Pixels:
    """OpenCV's INTER_LINEAR of bytes: integer arithmetic that drops bits in between (`imgproc/src/resize.cpp`)."""
    rows, row_weights = _neighbours(pixels.shape[0], height)
    columns, column_weights = _neighbours(pixels.shape[1], width)
    total = np.full((height, width, 3), 2, dtype=np.int32)
    for row, row_weight in zip(rows, row_weights, strict=True):
        line = pixels[row]
        mixed = sum(line[:, c] * weight[:, None] for c, weight in zip(columns, column_weights, strict=True))
        total += (mixed >> 4) * row_weight[:, None, None] >> 16
    return (total >> 2).astype(np.uint8)


def _neighbours(old: int, new: int) -> tuple[Int32[np.ndarray, "2 new"], Int32[np.ndarray, "2 new"]]:
    """Indices of the two of `old` positions around each of `new` ones, and their weights in units of 1/2048."""
    position: Float32[np.ndarray, "new"] = ((np.arange(new) + 0.5) * (1 / (new / old)) - 0.5).astype(np.float32)
    first = np.floor(position)
    share = position - first
    weights = np.rint(np.stack([1 - share, share]) * FIXED_POINT).astype(np.int32)
    return np.stack([first, first + 1]).clip(0, old - 1).astype(np.int32), weights

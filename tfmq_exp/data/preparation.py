"""How an image becomes a square of bytes: each function is one training program's own way, to the byte.

A Fréchet distance tells these ways apart, so real images are prepared as the network's training images were. Flips, which
training adds at random, are left out.
"""

from dataclasses import dataclass
from typing import Literal, Protocol, TypeAlias

import numpy as np
from jaxtyping import Float32, Int32, UInt8
from PIL import Image

Interpolation = Literal["bilinear", "bicubic", "lanczos"]
Pixels: TypeAlias = UInt8[np.ndarray, "height width 3"]
FILTERS = {
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}
MAX_PIXELS = 89_478_485  # of an image, and of what it is enlarged to: Pillow's own limit, 268 MB of RGB
FIXED_POINT = 2048  # OpenCV's weights are multiples of 1/2048


class Preparation(Protocol):
    """Makes an RGB image a square; a frozen dataclass, because its name and settings identify what came of it."""

    def __call__(self, image: Image.Image, size: int) -> Pixels:
        """The image as `size` rows and columns."""
        ...


def crop_centre(pixels: Pixels, size: int) -> Pixels:
    """The middle square. Where the margin is odd, its larger part is cut from the bottom or the right."""
    top, left = ((length - size) // 2 for length in pixels.shape[:2])
    return pixels[top : top + size, left : left + size]


def check_enlarged(width: int, height: int) -> None:
    """ValueError for an image so narrow that it would fill the memory once its short side has the right length."""
    if width * height > MAX_PIXELS:
        raise ValueError(f"its short side resized, it would have {width}x{height}; at most {MAX_PIXELS} pixels")


def crop_then_resize(image: Image.Image, size: int, interpolation: Interpolation) -> Pixels:
    """The middle square of the short side's length, resized by Pillow (latent-diffusion, `ldm/data/lsun.py`)."""
    square = Image.fromarray(crop_centre(np.asarray(image), min(image.size)))
    return np.asarray(square.resize((size, size), FILTERS[interpolation]))


def resize_then_crop(image: Image.Image, size: int, interpolation: Interpolation) -> Pixels:
    """The short side resized to `size` by Pillow, then the middle square.

    As `Resize` and `CenterCrop` of torchvision, which torch-fidelity applies under `samples_resize_and_crop`: the long side
    is rounded down, and half of an odd margin is rounded to even.
    """
    short = min(image.size)
    width, height = (size if length == short else int(size * length / short) for length in image.size)
    check_enlarged(width, height)
    pixels = np.asarray(image if short == size else image.resize((width, height), FILTERS[interpolation]))
    top, left = round((height - size) / 2), round((width - size) / 2)
    return pixels[top : top + size, left : left + size]


def halve_then_resize_then_crop(image: Image.Image, size: int) -> Pixels:
    """Averages of 2x2 pixels while both sides stay at least `size`, a bicubic resize of the short side, the middle square.

    As `center_crop_arr` of guided-diffusion (`guided_diffusion/image_datasets.py`).
    """
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    width, height = round(image.width * scale), round(image.height * scale)
    check_enlarged(width, height)
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    return crop_centre(np.asarray(image), size)


def aliased_resize_then_crop(image: Image.Image, size: int) -> Pixels:
    """The short side resized to `size` by two-by-two interpolation without a filter, then the middle square.

    As `SmallestMaxSize` and `CenterCrop` of albumentations in taming-transformers (`taming/data/base.py`), which resize by
    OpenCV's INTER_LINEAR. From 1024 to 256 pixels each becomes the mean of 4 of the 16 that it covers.
    """
    scale = size / min(image.size)
    pixels = np.asarray(image)
    if scale != 1:
        width, height = round(image.width * scale), round(image.height * scale)
        check_enlarged(width, height)
        pixels = resize_as_opencv(pixels, height, width)
    return crop_centre(pixels, size)


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
    """Which two of `old` positions each of `new` ones lies between, and their weights in 1/2048."""
    position: Float32[np.ndarray, "new"] = ((np.arange(new) + 0.5) * (1 / (new / old)) - 0.5).astype(np.float32)
    first = np.floor(position)
    share = position - first
    weights = np.rint(np.stack([1 - share, share]) * FIXED_POINT).astype(np.int32)
    return np.stack([first, first + 1]).clip(0, old - 1).astype(np.int32), weights


def _check(interpolation: str) -> None:
    if interpolation not in FILTERS:
        raise ValueError(f"interpolation must be one of {', '.join(FILTERS)}, got {interpolation!r}")


@dataclass(frozen=True)
class CropThenResize:
    """LSUN in latent-diffusion: `crop_then_resize`."""

    interpolation: Interpolation = "bicubic"

    def __post_init__(self) -> None:
        _check(self.interpolation)

    def __call__(self, image: Image.Image, size: int) -> Pixels:
        """The prepared image."""
        return crop_then_resize(image, size, self.interpolation)


@dataclass(frozen=True)
class ResizeThenCrop:
    """Torchvision and torch-fidelity: `resize_then_crop`."""

    interpolation: Interpolation = "bilinear"

    def __post_init__(self) -> None:
        _check(self.interpolation)

    def __call__(self, image: Image.Image, size: int) -> Pixels:
        """The prepared image."""
        return resize_then_crop(image, size, self.interpolation)


@dataclass(frozen=True)
class HalveThenResizeThenCrop:
    """ImageNet in guided-diffusion: `halve_then_resize_then_crop`."""

    def __call__(self, image: Image.Image, size: int) -> Pixels:
        """The prepared image."""
        return halve_then_resize_then_crop(image, size)


@dataclass(frozen=True)
class AliasedResizeThenCrop:
    """Faces in taming-transformers and latent-diffusion: `aliased_resize_then_crop`."""

    def __call__(self, image: Image.Image, size: int) -> Pixels:
        """The prepared image."""
        return aliased_resize_then_crop(image, size)


@dataclass(frozen=True)
class Unchanged:
    """Images that were prepared before: the pixels as they are, which the source then checks for their size."""

    def __call__(self, image: Image.Image, size: int) -> Pixels:
        """The image's pixels."""
        return np.asarray(image)

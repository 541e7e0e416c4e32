"""Scikit-learn's handwritten digits: the real images of the shipped model, which need no download."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Int, UInt8
from torch import Tensor

from tfmq_exp.data.decoding import check_batch

IMAGE_SIZE = 16


def load_images() -> tuple[UInt8[Tensor, "1797 1 16 16"], Int[Tensor, "1797"]]:
    """Scikit-learn's 1,797 digits (UCI Optical Recognition of Handwritten Digits, 8x8) at 16x16, and their labels."""
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)  # 64 pixels in rows, 0 .. 16
    images = torch.as_tensor(pixels, dtype=torch.float32).reshape(-1, 1, 8, 8) / 16.0
    enlarged = F.interpolate(images, size=(IMAGE_SIZE, IMAGE_SIZE), mode="bicubic", align_corners=False)
    return (enlarged.clamp(0, 1) * 255).round().to(torch.uint8), torch.as_tensor(labels)


class DigitsImages:
    """All 1,797 digits as an image dataset of one channel."""

    def __init__(self) -> None:
        self.images, labels = load_images()
        self.shape, self.classes = (1, IMAGE_SIZE, IMAGE_SIZE), [int(label) for label in labels]
        self.identity: Mapping[str, Any] = {"set": "scikit-learn digits", "images": len(self), "size": IMAGE_SIZE}

    def __len__(self) -> int:
        return len(self.images)

    def batches(self, size: int) -> Iterator[UInt8[Tensor, "batch 1 16 16"]]:
        check_batch(size)
        return iter(self.images.split(size))

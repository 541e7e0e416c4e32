"""Precision of a network's products: float32, TF32 on a GPU, or 16 bits by torch's autocast."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch

Precision = Literal["float32", "tf32", "bfloat16", "float16"]
PRECISIONS = ("float32", "tf32", "bfloat16", "float16")
HALF = {"bfloat16": torch.bfloat16, "float16": torch.float16}


@contextmanager
def products_in(precision: Precision, device: torch.device) -> Iterator[None]:
    """Compute products on a device in this precision, inside the block.

    TF32 keeps float32's range and ten bits of its mantissa; a CPU has none and computes in float32. Autocast keeps its 16-bit
    copies of the weights until the block ends: a weight that learns needs a block for every iteration.
    """
    if precision == "tf32":
        settings: tuple[Any, Any] = torch.backends.cuda.matmul, torch.backends.cudnn
        before = [each.allow_tf32 for each in settings]
        try:
            for each in settings:
                each.allow_tf32 = True
            yield
        finally:
            for each, was in zip(settings, before, strict=True):
                each.allow_tf32 = was
    elif precision in HALF:
        with torch.autocast(device.type, HALF[precision]):
            yield
    else:
        yield

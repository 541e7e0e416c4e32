"""Seeds of random streams: every image has its own, so that it does not depend on batch size, order or process."""

import hashlib
from collections.abc import Iterable, Sequence
from enum import StrEnum

import torch
from jaxtyping import Float
from torch import Tensor


class Stream(StrEnum):
    """Names of random streams, as `derive_seed` takes them: changing one changes numbers.

    Names of units, layers and quantizers are streams too, and count likewise.
    """

    IMAGES = "images"
    CALIBRATION = "calibration"
    CORRECTION = "correction"
    DIAGNOSTICS = "diagnostics"
    CONDITION = "condition"
    ACTIVATIONS = "activations"
    # of quantization-aware training: batches, those of range calibration and of the error; rows and order of a batch
    TRAINING = "training"
    RANGE_CALIBRATION = "observed"
    ERROR = "judged"
    BATCH = "batch"
    ORDER = "order"
    NETWORK = "network"


def derive_seed(*parts: int | str) -> int:
    """A 63-bit seed from anything that names a random stream: (run seed, "images", 17), say."""
    text = "/".join(str(part) for part in parts)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def seed_draws(device: torch.device, seed: int) -> None:
    """Seed what one device draws from now on. `torch.manual_seed` looks for every kind of device, a tenth of a small iteration."""
    if device.type == "cuda":
        torch.cuda.default_generators[device.index or 0].manual_seed(seed)
    else:
        torch.default_generator.manual_seed(seed)


def image_generators(seed: int, stream: str, indices: Iterable[int]) -> list[torch.Generator]:
    """A generator for each image of a stream. They live on the CPU, so every device draws the same noise."""
    return [torch.Generator().manual_seed(derive_seed(seed, stream, i)) for i in indices]


def initial_noise(
    generators: Sequence[torch.Generator], shape: tuple[int, ...], device: torch.device
) -> Float[Tensor, "batch ..."]:
    """x_T: standard normal noise, row i from generator i."""
    return torch.stack([torch.randn(shape, generator=g) for g in generators]).to(device)

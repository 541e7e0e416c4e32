"""The images that a network is trained on, as it sees them: bytes of pixels, or latents of the first stage."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from tfmq_exp.data.source import ImageSource
from tfmq_exp.denoisers.denoiser import Denoiser
from tfmq_exp.finite import require_finite

FILE = "examples.npy"
PROGRESS = "rows.json"


@dataclass(frozen=True)
class Examples:
    """x_0 of every training image, left on the disk: what is read comes from there.

    Args:
        values: uint8 pixels, or float32 latents that are scaled as the denoiser wants them; rows first.
    """

    values: np.ndarray

    @classmethod
    def load(cls, folder: Path) -> "Examples":
        """What `write` has made."""
        return cls(np.load(folder / FILE, mmap_mode="r"))

    def __len__(self) -> int:
        """How many."""
        return len(self.values)

    def rows(self, indices: Int[Tensor, "batch"]) -> Float[Tensor, "batch channels height width"]:
        """Some of them; pixels in [-1, 1]."""
        taken = torch.from_numpy(self.values[indices.numpy()])
        return taken.float() / 127.5 - 1 if taken.dtype is torch.uint8 else taken


def identity(source: ImageSource, denoiser: Denoiser, *, mirrored: bool) -> Mapping[str, Any]:
    """What identifies the examples: the images, and the first stage where there is one."""
    encoder = {"weights_sha256": denoiser.weights_sha256, "settings": dict(denoiser.settings)}
    return {
        "images": dict(source.identity),
        "mirrored": mirrored,
        "encoder": encoder if hasattr(denoiser.first_stage, "encode") else None,
    }


def check_size(source: ImageSource, denoiser: Denoiser) -> None:
    """ValueError for images that the denoiser's own would not look like."""
    with torch.no_grad():
        blank = torch.zeros(1, *denoiser.sample_shape, device=denoiser.device)
        wanted = tuple(denoiser.first_stage.decode(blank).shape[1:])
    if source.shape != wanted:
        raise ValueError(
            f"{denoiser.name} is trained on images {wanted}, these are {source.shape}: channels, height, width; "
            "data.size and data.grey of a folder of images say what becomes of them"
        )


def write(
    source: ImageSource,
    denoiser: Denoiser,
    folder: Path,
    batch: int,
    *,
    mirrored: bool,
    told: Callable[[int, int], None] = lambda _done, _of: None,
) -> None:
    """Put all examples into a file of the folder, after those that an interrupted attempt has left.

    Latents of KL autoencoders are the mean of the encoder's distribution, whose spread is far below that of the latents.

    Args:
        source: the images.
        denoiser: whose first stage encodes them, if it can; else they stay pixels.
        folder: where the file goes, and beside it how far it is.
        batch: images that are encoded together.
        mirrored: add the mirror image of every image, as a second half.
        told: how many images are done, of how many.
    """
    check_size(source, denoiser)
    encode: Any = getattr(denoiser.first_stage, "encode", None)
    path, progress, count = folder / FILE, folder / PROGRESS, len(source)
    shape = (count * (2 if mirrored else 1), *denoiser.sample_shape)
    made = json.loads(progress.read_text(encoding="utf-8")) if progress.is_file() else 0
    kind = np.uint8 if encode is None else np.float32
    file = np.lib.format.open_memmap(path, "r+" if made else "w+", None if made else kind, None if made else shape)
    done = 0
    for images in source.batches(batch):
        start, done = done, done + len(images)
        if done <= made:
            continue
        for half, part in enumerate((images, images.flip(-1)) if mirrored else (images,)):
            pixels = part if encode is None else encode(part.to(denoiser.device).float() / 127.5 - 1).cpu()
            require_finite(pixels, f"the latents of training images {start} to {done - 1}")
            file[half * count + start : half * count + done] = pixels.numpy()
        file.flush()
        progress.write_text(json.dumps(done), encoding="utf-8")
        told(done, count)
    if done != count:
        raise ValueError(f"the set of images promised {count} images and gave {done}")
    progress.unlink()

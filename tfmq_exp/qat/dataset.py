"""Training images as the network sees them: uint8 pixels, or latents of the first stage, in one file."""

import errno
import hashlib
import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from tfmq_exp.core.files import HASH
from tfmq_exp.core.finite import require_finite
from tfmq_exp.data.image_dataset import ImageDataset
from tfmq_exp.denoisers.denoiser import Denoiser

FILE = "examples.npy"
BATCHES = f"batches{HASH}"  # a line for each batch in the file, with its hash
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainingSet:
    """x_0 of every training image, read from disk as needed: uint8 pixels, or float32 latents as the denoiser takes them."""

    values: np.ndarray

    @classmethod
    def load(cls, folder: Path) -> "TrainingSet":
        """The set that `write_training_set` made."""
        return cls(np.load(folder / FILE, mmap_mode="r"))

    def __len__(self) -> int:
        return len(self.values)

    def rows(self, indices: Int[Tensor, "batch"]) -> Float[Tensor, "batch channels height width"]:
        """Images `indices`; pixels in [-1, 1]."""
        taken = torch.from_numpy(self.values[indices.numpy()])
        return taken.float() / 127.5 - 1 if taken.dtype is torch.uint8 else taken


def training_set_identity(source: ImageDataset, denoiser: Denoiser, *, horizontal_flip: bool) -> Mapping[str, Any]:
    """Identity of a training set: the images, and the first stage if there is one."""
    encoder = {"weights_sha256": denoiser.weights_sha256, "settings": dict(denoiser.settings)}
    return {
        "images": dict(source.identity),
        "horizontal_flip": horizontal_flip,
        "encoder": encoder if hasattr(denoiser.first_stage, "encode") else None,
    }


def write_training_set(
    source: ImageDataset,
    denoiser: Denoiser,
    folder: Path,
    batch: int,
    *,
    horizontal_flip: bool,
    progress: Callable[[int, int], None] = lambda _done, _total: None,
) -> None:
    """Write all images to a file of the folder, except for batches that an interrupted attempt has left there undamaged.

    Latents of KL autoencoders are the mean of the encoder's distribution, whose spread is far below that of the latents.

    Args:
        source: the images.
        denoiser: its first stage encodes them, if it can; else they stay pixels.
        folder: place of the file, and of the hashes of its batches.
        batch: images that are encoded together.
        horizontal_flip: add the mirror image of every image, as a second half.
        progress: called with the number of images done, and of all.

    Raises:
        OSError: no room on the disk, before the first image is read.
        ValueError: images of another size, or fewer than were promised.
    """
    if source.shape != (shape := denoiser.image_shape()):
        raise ValueError(
            f"{denoiser.name} is trained on images {shape}, these are {source.shape}: channels, height, width; "
            "data.size and data.grey of a folder of images say what becomes of them"
        )
    encode: Any = getattr(denoiser.first_stage, "encode", None)
    path, count, halves = folder / FILE, len(source), 2 if horizontal_flip else 1
    array = reserve(path, (count * halves, *denoiser.sample_shape), np.dtype(np.float32 if encode else np.uint8))
    lines = (folder / BATCHES).read_bytes().decode("ascii", "replace") if (folder / BATCHES).is_file() else ""
    written = dict(words for line in lines.splitlines() if len(words := line.split()) == 2)  # the last may be torn
    done = 0
    with path.open("r+b") as file, (folder / BATCHES).open("a", encoding="ascii") as hashes:
        for images in source.batches(batch):
            start, done = done, done + len(images)
            rows = [slice(half * count + start, half * count + done) for half in range(halves)]
            name = f"{start}-{done}"
            if name in written:
                if written[name] == hash_of_rows(array, rows):
                    continue
                log.warning("examples %s of %s are damaged: they are made again", name, path)
            for part, pixels in zip(rows, (images, images.flip(-1)), strict=False):
                values = encode(pixels.to(denoiser.device).float() / 127.5 - 1).cpu() if encode else pixels
                require_finite(values, f"the latents of training images {start} to {done - 1}")
                file.seek(array.offset + part.start * array.strides[0])
                file.write(np.ascontiguousarray(values.numpy(), array.dtype).tobytes())
            file.flush()
            hashes.write(f"{name} {hash_of_rows(array, rows)}\n")
            hashes.flush()
            progress(done, count)
        if done != count:
            raise ValueError(f"the set of images promised {count} images and gave {done}")
        os.fsync(file.fileno())


def reserve(path: Path, shape: tuple[int, ...], dtype: np.dtype[Any]) -> np.memmap:
    """An `.npy` file of this shape with its room on the disk, of which an existing one is kept; OSError without room."""
    try:
        array = np.lib.format.open_memmap(path, "r")
        if (array.shape, array.dtype) == (shape, dtype):
            return array
    except (OSError, ValueError):  # not there, or damaged
        pass
    array = np.lib.format.open_memmap(path, "w+", dtype, shape)
    size = path.stat().st_size
    with path.open("r+b") as file:
        try:
            os.posix_fallocate(file.fileno(), 0, size)  # a file with holes would meet the full disk later
        except AttributeError:  # not on this system
            pass
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):  # not on this file system
                path.unlink()
                raise OSError(error.errno, f"{error.strerror}, for {size} bytes", str(path)) from error
    return array


def hash_of_rows(array: np.ndarray, rows: list[slice]) -> str:
    """SHA-256 of several stretches of rows."""
    return hashlib.sha256(b"".join(array[part].data for part in rows)).hexdigest()

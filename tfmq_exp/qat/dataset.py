"""The images that a network is trained on, as it sees them: bytes of pixels, or latents of the first stage."""

import errno
import hashlib
import io
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
from tfmq_exp.data.source import ImageSource
from tfmq_exp.denoisers.denoiser import Denoiser

FILE = "examples.npy"
BATCHES = f"batches{HASH}"  # of an unfinished file: a line for each batch that is in it, with its hash
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainingSet:
    """x_0 of every training image, left on the disk: what is read comes from there.

    Args:
        values: uint8 pixels, or float32 latents that are scaled as the denoiser wants them; rows first.
    """

    values: np.ndarray

    @classmethod
    def load(cls, folder: Path) -> "TrainingSet":
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
    """Put all examples into a file of the folder, but for those that an interrupted attempt has left there undamaged.

    Latents of KL autoencoders are the mean of the encoder's distribution, whose spread is far below that of the latents.

    Args:
        source: the images.
        denoiser: whose first stage encodes them, if it can; else they stay pixels.
        folder: where the file goes, and beside it the hashes of the batches that are in it.
        batch: images that are encoded together.
        mirrored: add the mirror image of every image, as a second half.
        told: how many images are done, of how many.

    Raises:
        OSError: no room on the disk; said before the first image is read.
        ValueError: images of another size, or fewer than were promised.
    """
    check_size(source, denoiser)
    encode: Any = getattr(denoiser.first_stage, "encode", None)
    path, count, halves = folder / FILE, len(source), 2 if mirrored else 1
    kind = np.dtype(np.uint8 if encode is None else np.float32)
    header, size = layout((count * halves, *denoiser.sample_shape), kind)
    row = (size - len(header)) // (count * halves)
    make_room(path, header, size)
    kept, done = hashes(folder / BATCHES), 0
    with path.open("r+b") as file, (folder / BATCHES).open("a", encoding="ascii") as noted:
        for images in source.batches(batch):
            start, done = done, done + len(images)
            places = [len(header) + (half * count + start) * row for half in range(halves)]
            name, length = f"{start}-{done}", len(images) * row
            if name in kept and kept[name] == hash_at(file, places, length):
                continue
            if name in kept:
                log.warning("examples %s of %s are damaged: they are made again", name, path)
            for place, part in zip(places, (images, images.flip(-1)), strict=False):
                pixels = part if encode is None else encode(part.to(denoiser.device).float() / 127.5 - 1).cpu()
                require_finite(pixels, f"the latents of training images {start} to {done - 1}")
                file.seek(place)
                file.write(np.ascontiguousarray(pixels.numpy(), kind).tobytes())
            file.flush()
            noted.write(f"{name} {hash_at(file, places, length)}\n")
            noted.flush()
            told(done, count)
        if done != count:
            raise ValueError(f"the set of images promised {count} images and gave {done}")
        os.fsync(file.fileno())


def layout(shape: tuple[int, ...], kind: np.dtype[Any]) -> tuple[bytes, int]:
    """The first bytes of an `.npy` file with such an array, and how many bytes the whole file has."""
    header = io.BytesIO()
    described = {"descr": np.lib.format.dtype_to_descr(kind), "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(header, described)
    return header.getvalue(), len(header.getvalue()) + int(np.prod(shape)) * kind.itemsize


def make_room(path: Path, header: bytes, size: int) -> None:
    """Have a file with this header and of this size, whose room on the disk is its own; one that has both stays."""
    if path.is_file() and path.stat().st_size == size:
        with path.open("rb") as file:
            if file.read(len(header)) == header:
                return
    with path.open("wb") as file:
        file.write(header)
        file.flush()
        try:
            os.posix_fallocate(file.fileno(), 0, size)  # a file with holes would meet the full disk later
        except (AttributeError, OSError) as error:
            if isinstance(error, OSError) and error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
                path.unlink()
                raise OSError(error.errno, f"{error.strerror}, for {size} bytes", str(path)) from error
            file.truncate(size)  # the system or the file system knows no such thing


def hashes(path: Path) -> dict[str, str]:
    """Batch -> hash, from lines of which the last may be torn."""
    lines = path.read_bytes().decode("ascii", "replace").splitlines() if path.is_file() else []
    return {words[0]: words[1] for line in lines if len(words := line.split()) == 2}


def hash_at(file: Any, places: list[int], length: int) -> str:
    """SHA-256 of stretches of an open file, all of the same length."""
    digest = hashlib.sha256()
    for place in places:
        file.seek(place)
        digest.update(file.read(length))
    return digest.hexdigest()

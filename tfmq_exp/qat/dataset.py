"""Training images as the network sees them, uint8 pixels or latents of the first stage, in one file; and batches of them."""

import errno
import hashlib
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tfmq_exp.core.files import HASH
from tfmq_exp.core.finite import require_finite
from tfmq_exp.core.seeds import Stream, derive_seed
from tfmq_exp.data.image_dataset import ImageDataset
from tfmq_exp.denoisers.denoiser import Denoiser
from tfmq_exp.qat.training_noise import Drawn, draw_timesteps

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
    words = map(str.split, lines.splitlines())
    written, done = {pair[0]: pair[1] for pair in words if len(pair) == 2}, 0  # the last line may be torn
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


class Batch(NamedTuple):
    """One iteration: indices and x_0 of its images, their noise, places of their timesteps, and which keep their condition."""

    rows: Int[Tensor, "batch"]
    clean: Float[Tensor, "batch ..."]
    noise: Float[Tensor, "batch ..."]
    t: Int[Tensor, "batch"]
    conditioned: Bool[Tensor, "batch"]

    def on(self, device: torch.device) -> "Batch":
        """The same on a device."""
        return Batch(*(field.to(device) for field in self))


@dataclass(frozen=True)
class NoisyBatches:
    """Batches by their number, so that a resumed training has those that it would have had.

    Images come in another random order in every epoch; timesteps are random, see `draw_timesteps`.
    """

    images: TrainingSet  # to draw from
    size: int  # rows of a batch
    timesteps: int  # number of timesteps of the training
    condition_dropout: float  # share of rows whose condition is dropped, 0 to 1
    seed: int  # of all random numbers
    stream: str = Stream.TRAINING  # name of the random stream
    drawn: Drawn = "uniform"  # distribution of timesteps

    def __post_init__(self) -> None:
        if len(self.images) == 0:
            raise ValueError("there are no examples to train on")

    def batch(self, number: int) -> Batch:
        """Batch `number`, from 0; one at the end of an epoch continues with the next."""
        generator = torch.Generator().manual_seed(derive_seed(self.seed, self.stream, Stream.BATCH, number))
        count = len(self.images)
        positions = torch.arange(number * self.size, (number + 1) * self.size)
        epochs = range(int(positions[0]) // count, int(positions[-1]) // count + 1)
        orders = [shuffled(count, self.seed, epoch)[positions[positions // count == epoch] % count] for epoch in epochs]
        rows = torch.cat(orders)
        clean = self.images.rows(rows)
        noise = torch.randn(clean.shape, generator=generator)
        t = draw_timesteps(self.drawn, self.timesteps, self.size, generator)
        return Batch(rows, clean, noise, t, torch.rand(self.size, generator=generator) >= self.condition_dropout)


@dataclass(frozen=True)
class BatchRange:
    """Batches start .. end - 1; an iterable without a length, so that Lightning counts steps and not epochs."""

    batches: NoisyBatches
    start: int
    end: int

    def __iter__(self) -> Iterator[Batch]:
        return map(self.batches.batch, range(self.start, self.end))


@lru_cache(maxsize=2)
def shuffled(count: int, seed: int, epoch: int) -> Int[Tensor, "count"]:
    """Order of the images in an epoch."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(derive_seed(seed, Stream.ORDER, epoch)))

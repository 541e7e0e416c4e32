"""CIFAR-10's 50,000 training images (Krizhevsky 2009), from either archive that is published."""

import hashlib
import pickle
from collections.abc import Iterator, Mapping
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import UInt8
from torch import Tensor

from tfmq_exp.data.decoding import check_batch
from tfmq_exp.data.hashes import hash_file

SHAPE = (3, 32, 32)
PIXELS = 3 * 32 * 32  # bytes of an image
PER_FILE = 10_000
BINARY, PYTHON = "cifar-10-batches-bin", "cifar-10-batches-py"
BINARY_FILES = tuple(f"data_batch_{i}.bin" for i in range(1, 6))
# md5 of the python version's files, as torchvision checks them
PYTHON_FILES = {
    "data_batch_1": "c99cafc152244af753f735de768cd75f",
    "data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
    "data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
    "data_batch_4": "634d18415352ddfa80567beed471001a",
    "data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
}
# by which NumPy before 2 (core) and since (_core) pickles an array
ARRAY_PARTS: dict[str, Any] = {
    **{f"numpy.{core}.multiarray._reconstruct": np.zeros(0).__reduce__()[0] for core in ("core", "_core")},
    **{"numpy.ndarray": np.ndarray, "numpy.dtype": np.dtype},
}
ORIGIN = "https://www.cs.toronto.edu/~kriz/cifar.html"


class CIFAR10:
    """The training images, in the order of the files.

    `path` has `cifar-10-batches-bin` or `cifar-10-batches-py`; of both the first is read, which is no pickle.
    """

    def __init__(self, path: str) -> None:
        found = [name for name in (BINARY, PYTHON) if Path(path, name).is_dir()]
        if not found:
            expected = f"expected {BINARY}/ or {PYTHON}/ there, of {ORIGIN} (nothing is downloaded)"
            raise FileNotFoundError(f"no CIFAR-10 at {path}: {expected}")
        self.version, folder = found[0], Path(path, found[0])
        self.files = [folder / name for name in (BINARY_FILES if self.version == BINARY else PYTHON_FILES)]
        if missing := [file.name for file in self.files if not file.is_file()]:
            raise FileNotFoundError(f"{folder} lacks {', '.join(missing)}; unpack the archive of {ORIGIN} again")
        self.shape = SHAPE
        self.identity: Mapping[str, Any] = {
            "set": "CIFAR-10 training images",
            "version": self.version,
            "files": {file.name: hash_file(file) for file in self.files},
        }

    def __len__(self) -> int:
        return PER_FILE * len(self.files)

    def batches(self, size: int) -> Iterator[UInt8[Tensor, "batch 3 32 32"]]:
        """Read all images, `size` at a time; ValueError names a file that is not the published one."""
        check_batch(size)
        return iter(torch.from_numpy(np.concatenate([read_images(file) for file in self.files])).split(size))


def read_images(path: Path) -> UInt8[np.ndarray, "images 3 32 32"]:
    """Read a file of either version; ValueError for one that is not the published one."""
    images, labels = read_binary(path) if path.suffix == ".bin" else read_python(path)
    if images.shape != (PER_FILE, PIXELS) or len(labels) != PER_FILE:
        counts = f"expected {(PER_FILE, PIXELS)} and {PER_FILE}"
        raise ValueError(f"{path} holds images {images.shape} and {len(labels)} labels, {counts}")
    if labels.min() < 0 or labels.max() > 9:
        raise ValueError(f"{path} has labels from {labels.min()} to {labels.max()}, expected 0 to 9")
    return images.reshape(-1, *SHAPE)


def read_binary(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Images and labels of a file with, for each image, a byte with the label, then red, green and blue planes."""
    data = np.fromfile(path, dtype=np.uint8)
    if data.size != (expected := PER_FILE * (1 + PIXELS)):
        raise ValueError(f"{path} has {data.size} bytes, expected {expected}: it is truncated or another file")
    rows = data.reshape(PER_FILE, 1 + PIXELS)
    return rows[:, 1:], rows[:, 0]


class BatchUnpickler(pickle.Unpickler):
    """Reads a pickle of a dict with an array, labels and names; nothing else that it names is looked up."""

    def find_class(self, module: str, name: str, /) -> Any:
        if (part := ARRAY_PARTS.get(f"{module}.{name}")) is None:
            raise pickle.UnpicklingError(f"refuses to load '{module}.{name}': it is no part of an array")
        return part


def read_python(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Images and labels of a pickle, which is the published one or is not read."""
    content, expected = path.read_bytes(), PYTHON_FILES[path.name]
    found = hashlib.md5(content, usedforsecurity=False).hexdigest()
    if found != expected:
        raise ValueError(f"{path} is damaged or not the published file: its md5 is {found}, expected {expected}")
    try:
        batch = BatchUnpickler(BytesIO(content), encoding="bytes").load()  # Python 2 wrote it: its strings are bytes
        images, labels = batch[b"data"], np.asarray(batch[b"labels"], dtype=np.int64)
        if images.dtype != np.uint8:
            raise TypeError(f"its images are of type {images.dtype}, expected bytes")
    except Exception as error:  # another pickle fails in any way
        raise ValueError(f"{path} is no batch of CIFAR-10 ({type(error).__name__}: {error})") from error
    return images, labels

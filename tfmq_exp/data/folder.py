"""Images of a folder: what most data sets are when they are unpacked."""

import hashlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image
from torch import Tensor

from tfmq_exp.data.decoding import check_batch, decode, describe, in_order, stacked
from tfmq_exp.data.preparation import Pixels, Preparation
from tfmq_exp.files import read_lines

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")


def find_images(root: Path) -> list[str]:
    """Paths of all images below a folder, relative to it. Links are followed; names that begin with a dot are left out."""
    found: list[str] = []
    for folder, inner, files in os.walk(root, followlinks=True):
        inner[:] = [name for name in inner if not name.startswith(".")]
        names = [name for name in files if name.lower().endswith(SUFFIXES) and not name.startswith(".")]
        place = Path(folder).relative_to(root).as_posix()
        found += [name if place == "." else f"{place}/{name}" for name in names]
    return sorted(found)


def hash_of_files(root: Path, names: list[str]) -> str:
    """The sha256 over every file's name and size in bytes."""
    digest = hashlib.sha256()
    for name in names:
        digest.update(os.fsencode(name) + b"\0%d\n" % (root / name).stat().st_size)
    return digest.hexdigest()


class ImageFolder:
    """PNG, JPEG and WebP files of a folder and the folders in it, in the order of their relative paths.

    Args:
        path: the folder.
        size: pixels of a side after preparation.
        preparation: how an image becomes a square.
        listing: a text file with the relative paths of the images that count, one a line; null for all.
        origin: what belongs there and where it is published; a part of the message if it is missing.
        grey: one channel, the images' luma (ITU-R 601), for networks of such images.

    Raises:
        FileNotFoundError: no such folder or listing, or a listed image is missing.
        ValueError: no images.
    """

    def __init__(
        self,
        path: str,
        size: int,
        preparation: Preparation,
        listing: str | None = None,
        origin: str = "any images",
        *,
        grey: bool = False,
    ) -> None:
        self.root, self.preparation, self.grey = Path(path), preparation, grey
        if not self.root.is_dir():
            raise FileNotFoundError(f"no folder of images at {path}; expected there: {origin} (nothing is downloaded)")
        self.names = find_images(self.root) if listing is None else read_listing(Path(listing), self.root)
        if not self.names:
            raise ValueError(f"no images ({', '.join(SUFFIXES)}) in {listing or path}; expected: {origin}")
        self.shape = (1 if grey else 3, size, size)
        self.identity: Mapping[str, Any] = {
            "images": len(self.names),
            "files_sha256": hash_of_files(self.root, self.names),
            "size": size,
            "preparation": describe(preparation),
            **({"grey": True} if grey else {}),
        }

    def __len__(self) -> int:
        """How many images."""
        return len(self.names)

    def batches(self, size: int) -> Iterator[UInt8[Tensor, "batch channels height width"]]:
        """All of them, `size` at a time; ValueError names the first that cannot be read."""
        check_batch(size)
        return stacked(in_order(self._decode, self.names), size)

    def _decode(self, name: str) -> Pixels:
        path = self.root / name
        pixels = decode(str(path), path, self.shape[1], self.preparation)
        return np.asarray(Image.fromarray(pixels).convert("L"))[..., None] if self.grey else pixels


def read_listing(path: Path, root: Path) -> list[str]:
    """The paths in a text file, sorted; FileNotFoundError if it, or one of them, is missing."""
    if not path.exists():
        raise FileNotFoundError(
            f"no listing at {path}; expected a text file with a path relative to {root} on each line"
        )
    names = sorted({line for line in read_lines(path) if line})
    missing = [name for name in names if not (root / name).is_file()]
    if missing:
        raise FileNotFoundError(
            f"{len(missing)} of {len(names)} images listed in {path} are not in {root}: {missing[0]}"
        )
    return names

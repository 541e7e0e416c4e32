"""Folders of images: what most data sets are when they are unpacked."""

import hashlib
import logging
import posixpath
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image
from torch import Tensor

from tfmq_exp.core.text_files import read_lines
from tfmq_exp.data.decoding import decode, describe, in_order, stacked
from tfmq_exp.data.hashes import hash_files
from tfmq_exp.data.preparation import Pixels, Preparation
from tfmq_exp.data.tree import files_below

# By the end of a name, in either case; the format is then read from the content.
SUFFIXES = (
    *(".png", ".apng", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".avif", ".gif", ".bmp", ".dib", ".tif", ".tiff"),
    *(".ppm", ".pgm", ".pbm", ".pnm", ".jp2", ".j2k", ".jpf", ".jpx", ".tga", ".qoi"),
)
# Files of systems whose names do not begin with a dot.
SYSTEM = ("thumbs.db", "desktop.ini", "__macosx", "@eadir", "lost+found", "$recycle.bin", "system volume information")
log = logging.getLogger(__name__)


def find_images(root: Path) -> tuple[list[str], dict[str, int]]:
    """The images below a folder, sorted, and the number of other files by the end of their names.

    Folders that links lead to belong to it, once; hidden files and those of systems do not.
    """
    names, left_out, broken = list[str](), Counter[str](), list[str]()
    for name, kind in files_below(root, lambda name: name.startswith(".") or name.lower() in SYSTEM):
        suffix = PurePosixPath(name).suffix.lower()
        if kind == "broken link":
            broken.append(name)
        elif kind == "file" and name.lower().endswith(SUFFIXES):
            names.append(name)
        else:
            plain = suffix if re.fullmatch(r"\.\w{1,10}", suffix, re.ASCII) else "no suffix"
            left_out[plain if kind == "file" else kind] += 1
    if broken:
        found = f"{len(broken)} links in {root} lead nowhere, the first is {min(broken)}"
        raise FileNotFoundError(f"{found}: a disk that is not mounted? Remove them, or mend what they point to")
    return sorted(names), dict(sorted(left_out.items()))


def read_listing(path: Path, root: Path) -> list[str]:
    """The paths in a text file, sorted, each once; all are files below `root`."""
    if not path.exists():
        expected = f"expected a text file with a path relative to {root} on each line"
        raise FileNotFoundError(f"no listing at {path}; {expected}")
    return check_listing([line for line in read_lines(path) if line], root, path)


def check_listing(lines: Sequence[str], root: Path, path: object) -> list[str]:
    """The relative paths, sorted, each once; ValueError or FileNotFoundError unless all are files below `root`."""
    names = sorted({posixpath.normpath(name) for name in lines})
    if outside := [name for name in lines if re.match(r"/|\.\.(/|$)", posixpath.normpath(name))]:
        raise ValueError(f"{outside[0]!r} in {path} leads out of the folder of images; expected paths relative to it")
    if len(names) < len(lines):
        log.warning("%d lines of %s name an image again; each counts once", len(lines) - len(names), path)
    if missing := [name for name in names if not (root / name).is_file()]:
        found = f"{len(missing)} of {len(names)} images listed in {path}"
        raise FileNotFoundError(f"{found} are not in {root}: {missing[0]}")
    return names


class ImageFolder:
    """Files of a folder and the folders in it whose names end in one of `SUFFIXES`, in the order of their relative paths.

    What identifies them is their content in this order, whatever their names.

    Args:
        path: the folder.
        size: pixels of a side after preparation.
        preparation: makes an image a square.
        listing: the relative paths of the images to read, or a text file with one a line; None for all.
        origin: which images belong there and where they are published, for the message if the folder is missing.
        grey: one channel, the images' luma (ITU-R 601), for networks of such images.
    """

    def __init__(
        self,
        path: str,
        size: int,
        preparation: Preparation,
        listing: str | Sequence[str] | None = None,
        origin: str = "any images",
        *,
        grey: bool = False,
    ) -> None:
        self.root, self.preparation, self.grey = Path(path), preparation, grey
        if not self.root.is_dir():
            found = f"{path} is a file, no folder" if self.root.exists() else f"no folder of images at {path}"
            raise FileNotFoundError(f"{found}; expected there: {origin} (nothing is downloaded)")
        if isinstance(listing, str):
            self.names, left_out = read_listing(Path(listing), self.root), {}
        elif listing is not None:
            self.names, left_out = check_listing(listing, self.root, "the list"), {}
        else:
            self.names, left_out = find_images(self.root)
        if left_out:
            counts = ", ".join(f"{count} {suffix}" for suffix, count in left_out.items())
            total = sum(left_out.values())
            log.warning("%d files in %s are left out, as no images by their names: %s", total, path, counts)
        if not self.names:
            raise ValueError(
                f"no images ({', '.join(SUFFIXES)}) in {listing if isinstance(listing, str) else path}; expected: {origin}"
            )
        self.shape = (1 if grey else 3, size, size)
        self.hashes = b"".join(hash_files(self.root, self.names))
        self.identity: Mapping[str, Any] = {
            "images": len(self.names),
            "files_sha256": hashlib.sha256(self.hashes).hexdigest(),
            "size": size,
            "preparation": describe(preparation),
            **({"grey": True} if grey else {}),
            **({"left_out": left_out} if left_out else {}),
        }

    def __len__(self) -> int:
        return len(self.names)

    def batches(self, size: int) -> Iterator[UInt8[Tensor, "batch channels height width"]]:
        """Read all images; ValueError with the name of one that cannot be decoded, or has changed meanwhile."""
        return stacked(in_order(self._decode, range(len(self))), size)

    def _decode(self, i: int) -> Pixels:
        path = self.root / self.names[i]
        try:
            content = path.read_bytes()
        except OSError as error:
            before = "was there when the folder was looked through"
            raise ValueError(f"{path} {before}, and cannot be read now: {error.strerror}") from error
        if hashlib.sha256(content).digest() != self.hashes[32 * i : 32 * (i + 1)]:
            raise ValueError(f"{path} has changed since the folder was looked through; start again once it is complete")
        pixels = decode(str(path), content, self.shape[1], self.preparation)
        return np.asarray(Image.fromarray(pixels).convert("L"))[..., None] if self.grey else pixels

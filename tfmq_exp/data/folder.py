"""Images of a folder: what most data sets are when they are unpacked."""

import hashlib
import logging
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image
from torch import Tensor

from tfmq_exp.core.text_files import read_lines
from tfmq_exp.data.decoding import check_batch, decode, describe, in_order, stacked
from tfmq_exp.data.hashes import hash_files
from tfmq_exp.data.preparation import Pixels, Preparation
from tfmq_exp.data.tree import files_below

# By the end of a name, in either case; what a file is, is then read from its content.
SUFFIXES = (
    *(".png", ".apng", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".avif", ".gif", ".bmp", ".dib", ".tif", ".tiff"),
    *(".ppm", ".pgm", ".pbm", ".pnm", ".jp2", ".j2k", ".jpf", ".jpx", ".tga", ".qoi"),
)
# What systems put into folders, beside names that begin with a dot.
SYSTEM = frozenset(
    {"thumbs.db", "desktop.ini", "__macosx", "@eadir", "lost+found", "$recycle.bin", "system volume information"}
)
DIGEST = hashlib.sha256().digest_size
log = logging.getLogger(__name__)


def passed_over(name: str) -> bool:
    """Whether a file or folder is hidden, or the system's own."""
    return name.startswith(".") or name.lower() in SYSTEM


def find_images(root: Path) -> tuple[list[str], dict[str, int]]:
    """The images below a folder, and how many other files there are.

    Folders that links lead to belong to it, once; hidden files and those of systems do not.

    Returns:
        the paths of images relative to the folder, sorted; the number of files that are none, by the end of their names.

    Raises:
        FileNotFoundError: a link that leads nowhere; says how many there are.
        OSError: a folder that cannot be listed.
    """
    names, left_out, broken = list[str](), Counter[str](), list[str]()
    for name, kind in files_below(root, passed_over):
        if kind == "broken link":
            broken.append(name)
        elif kind == "file" and name.lower().endswith(SUFFIXES):
            names.append(name)
        else:
            left_out[suffix_of(name) if kind == "file" else kind] += 1
    if broken:
        raise FileNotFoundError(
            f"{len(broken)} links in {root} lead nowhere, the first is {min(broken)}: a disk that is not mounted? "
            "Remove them, or mend what they point to"
        )
    return sorted(names), dict(sorted(left_out.items()))


def suffix_of(name: str) -> str:
    """The end of a name in lower case, where it has a plain one."""
    suffix = PurePosixPath(name).suffix.lower()
    return suffix if re.fullmatch(r"\.\w{1,10}", suffix, re.ASCII) else "no suffix"


class ImageFolder:
    """Files of a folder and the folders in it whose names end in one of `SUFFIXES`, in the order of their relative paths.

    What identifies them is their content in this order, whatever their names.

    Args:
        path: the folder.
        size: pixels of a side after preparation.
        preparation: how an image becomes a square.
        listing: a text file with the relative paths of the images that count, one a line; null for all.
        origin: what belongs there and where it is published; a part of the message if it is missing.
        grey: one channel, the images' luma (ITU-R 601), for networks of such images.

    Raises:
        FileNotFoundError: no such folder or listing, a listed image is missing, or a link leads nowhere.
        OSError: a folder or a file that cannot be read.
        ValueError: no images, or a listing with paths outside the folder.
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
            what = f"{path} is a file, no folder" if self.root.exists() else f"no folder of images at {path}"
            raise FileNotFoundError(f"{what}; expected there: {origin} (nothing is downloaded)")
        self.names, left_out = (
            find_images(self.root) if listing is None else (read_listing(Path(listing), self.root), {})
        )
        if left_out:
            counts = ", ".join(f"{count} {suffix}" for suffix, count in left_out.items())
            log.warning(
                "%d files in %s are left out, as no images by their names: %s", sum(left_out.values()), path, counts
            )
        if not self.names:
            raise ValueError(f"no images ({', '.join(SUFFIXES)}) in {listing or path}; expected: {origin}")
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
        """How many images."""
        return len(self.names)

    def batches(self, size: int) -> Iterator[UInt8[Tensor, "batch channels height width"]]:
        """All of them, `size` at a time.

        Raises:
            ValueError: one that cannot be read as an image, or is not what it was when the set was made; says which.
        """
        check_batch(size)
        return stacked(in_order(self._decode, range(len(self))), size)

    def _decode(self, i: int) -> Pixels:
        path = self.root / self.names[i]
        try:
            content = path.read_bytes()
        except OSError as error:
            raise ValueError(
                f"{path} was there when the folder was looked through, and cannot be read now: {error.strerror}"
            ) from error
        if hashlib.sha256(content).digest() != self.hashes[i * DIGEST : (i + 1) * DIGEST]:
            raise ValueError(f"{path} has changed since the folder was looked through; start again once it is complete")
        pixels = decode(str(path), content, self.shape[1], self.preparation)
        return np.asarray(Image.fromarray(pixels).convert("L"))[..., None] if self.grey else pixels


def read_listing(path: Path, root: Path) -> list[str]:
    """The paths in a text file, sorted, each once.

    Raises:
        FileNotFoundError: it is missing, or a file that it names.
        ValueError: no text file, or a path that is not below the folder.
    """
    if not path.exists():
        raise FileNotFoundError(
            f"no listing at {path}; expected a text file with a path relative to {root} on each line"
        )
    lines = [line for line in read_lines(path) if line]
    names = sorted({below(name, path) for name in lines})
    if len(names) < len(lines):
        log.warning("%d lines of %s name an image again; each counts once", len(lines) - len(names), path)
    missing = [name for name in names if not (root / name).is_file()]
    if missing:
        raise FileNotFoundError(
            f"{len(missing)} of {len(names)} images listed in {path} are not in {root}: {missing[0]}"
        )
    return names


def below(name: str, listing: Path) -> str:
    """A listed path in its shortest form; ValueError for one that leads out of the folder."""
    parts = list[str]()
    for part in PurePosixPath(name).parts:
        if part == ".." and parts:
            parts.pop()
        elif part in ("..", "/", "//"):
            raise ValueError(f"{name!r} in {listing} leads out of the folder of images; expected paths relative to it")
        else:
            parts.append(part)
    return "/".join(parts)

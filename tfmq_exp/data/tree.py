"""Walk over the files below a folder. Links are followed, and every folder is read once, under the first of its names."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal, NoReturn

Kind = Literal["file", "broken link", "no regular file"]


def files_below(root: Path, is_skipped: Callable[[str], bool] = lambda _: False) -> Iterator[tuple[str, Kind]]:
    """Every entry below a folder that is no folder, in no order: its path relative to `root`, with slashes, and its kind.

    A link has the kind of its target; `no regular file` is a pipe, a socket or a device. A folder with several names has
    its own before those of links, and of these the first in alphabetical order. A link to the folder itself or to one that
    it lies in is not followed. Files and folders whose name `is_skipped` are left out.
    """
    seen, links = {str(parent) for parent in root.resolve().parents}, [""]
    while links:
        top = links.pop(links.index(min(links)))
        for folder, folders, files in os.walk(root / top, onerror=_raise):
            if (here := os.path.realpath(folder)) in seen:
                folders.clear()
                continue
            seen.add(here)
            place = os.path.relpath(folder, root)
            folders[:] = [name for name in folders if not is_skipped(name)]
            links += [os.path.normpath(f"{place}/{name}") for name in folders if os.path.islink(f"{folder}/{name}")]
            for name in (name for name in files if not is_skipped(name)):
                path = f"{folder}/{name}"
                other: Kind = "no regular file" if os.path.exists(path) else "broken link"
                yield os.path.normpath(f"{place}/{name}"), "file" if os.path.isfile(path) else other


def _raise(error: OSError) -> NoReturn:
    raise type(error)(f"cannot list the folder {error.filename}: {error.strerror}") from error

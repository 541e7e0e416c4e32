"""Walk over the files below a folder. Links are followed, and every folder is read once, under the first of its names."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal

Kind = Literal["file", "broken link", "no regular file"]


def files_below(root: Path, is_skipped: Callable[[str], bool] = lambda _: False) -> Iterator[tuple[str, Kind]]:
    """Every entry below a folder that is no folder, in no order: its path relative to `root`, with slashes, and its kind.

    A link has the kind of its target; `no regular file` is a pipe, a socket or a device. A folder with several names has
    its own before those of links, and of these the first in alphabetical order. A link to the folder itself or to one that
    it lies in is not followed.

    Args:
        root: the folder.
        is_skipped: whether files and folders of a name are left out.

    Raises:
        OSError: a folder that cannot be listed; says which.
    """
    seen = set(root.resolve().parents)
    folders, links = [""], list[str]()
    while folders or links:
        place = folders.pop() if folders else links.pop(links.index(min(links)))
        if (here := (root / place).resolve()) in seen:
            continue
        seen.add(here)
        for entry in _entries(root / place):
            if is_skipped(entry.name):
                continue
            name = f"{place}/{entry.name}" if place else entry.name
            kind = _kind(entry)
            if kind != "folder":
                yield name, kind
            else:
                (links if entry.is_symlink() else folders).append(name)


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return list(entries)
    except OSError as error:
        raise type(error)(f"cannot list the folder {folder}: {error.strerror}") from error


def _kind(entry: os.DirEntry[str]) -> Kind | Literal["folder"]:
    try:
        if entry.is_dir():
            return "folder"
        if entry.is_file():
            return "file"
        return "no regular file" if os.path.exists(entry.path) else "broken link"
    except OSError:  # links that lead in a circle, or into a folder that may not be entered
        return "broken link"

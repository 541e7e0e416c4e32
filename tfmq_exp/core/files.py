"""Files that are there whole, or not at all, whenever a process dies, and that say whether they are what was written."""

import hashlib
import json
import logging
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

HASH = ".sha256"  # ends the name of a file that holds the hash of another, whose name stands before it
log = logging.getLogger(__name__)


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` make a file under a temporary name and move it into place.

    Raises:
        OSError: it could not be written, on a full disk say; names the file.
    """
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")  # of a killed run a process may still write
    try:
        write(partial)
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        partial.replace(path)
    except Exception as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise OSError(error.errno, os.strerror(error.errno), str(path)) from error
        if any(words in str(error) for words in ("(os error", "inline_container")):  # of safetensors and of torch
            raise OSError(f"{path} could not be written, the disk may be full: {error}") from error
        raise
    finally:
        partial.unlink(missing_ok=True)


def write_json(path: Path, data: Any) -> None:
    """JSON in UTF-8, whatever the locale; a name of a file that is no text keeps its bytes, in JSON's own notation.

    Raises:
        ValueError: data with a NaN or an infinity, which JSON does not have.
    """
    try:
        text = as_json(data)
    except ValueError as error:
        raise ValueError(f"{path.name} would hold a number that is not finite: {error}") from error
    write_atomically(path, lambda p: p.write_text(text, encoding="utf-8", errors="backslashreplace"))


def as_json(data: Any) -> str:
    """The text of a file; ValueError for a NaN or an infinity."""
    return json.dumps(data, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def write_record(path: Path, data: Mapping[str, Any]) -> None:
    """A JSON object with its own hash beside its other keys, as `sha256`."""
    write_json(path, hashed(data))


def hashed(data: Mapping[str, Any]) -> dict[str, Any]:
    """Plain data with its own hash."""
    plain = json.loads(json.dumps(data))  # as it will be read: keys are texts, tuples lists
    return {**plain, "sha256": hash_of_json(plain)}


def read_record(path: Path) -> dict[str, Any]:
    """What `write_record` wrote; an object without hash is taken as it is.

    Raises:
        ValueError: the file is damaged, or no JSON object; names it.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged, or no JSON: {error}") from error
    if not isinstance(data, dict):
        raise ValueError(f"{path} holds no JSON object")
    wanted = data.pop("sha256", None)
    if wanted not in (None, hash_of_json(data)):
        raise ValueError(f"{path} is damaged: it is not what was written")
    return data


def hash_of_json(data: Any) -> str:
    """SHA-256 of plain data, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()


def sha256_of(path: Path) -> str:
    """Hash of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_checked(path: Path, write: Callable[[Path], object]) -> None:
    """A file, and beside it its hash, by which `intact` knows it: for work that may break off and be taken up again."""

    def hash_first(partial: Path) -> None:
        write(partial)
        digest = sha256_of(partial)
        write_atomically(hash_path(path), lambda other: other.write_text(digest, encoding="ascii"))

    write_atomically(path, hash_first)


def hash_path(path: Path) -> Path:
    """Where the hash of a file lies."""
    return path.with_name(path.name + HASH)


def unchanged(path: Path) -> bool:
    """Whether a file is what `write_checked` wrote."""
    try:
        return hash_path(path).read_bytes().strip() == sha256_of(path).encode()
    except FileNotFoundError:
        return False


def intact(path: Path) -> bool:
    """Whether a file of work that broke off is there and can be used; one that cannot is named in the log."""
    if not path.is_file():
        return False
    if not (good := unchanged(path)):
        log.warning("%s was not written to its end, or is damaged: it is made again", path)
    return good

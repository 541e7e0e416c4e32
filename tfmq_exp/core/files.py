"""Files that are written whole or not at all, whenever a process dies, JSON, and hashes that show damage."""

import hashlib
import json
import logging
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tfmq_exp.core.file_kind import instead_of_text

HASH = ".sha256"  # ends the name of a file that holds the hash of the file named before it
log = logging.getLogger(__name__)


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` make a file under a temporary name and move it into place; an OSError names the file."""
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


def read_json(path: Path) -> dict[str, Any]:
    """Read a file with one JSON object; ValueError for one that is damaged, something else, or no object."""
    if not path.is_file():
        raise FileNotFoundError(f"no {path.name} in {path.parent}")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} {instead_of_text(path) or f'is damaged, or no JSON: {error}'}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds no JSON object: expected names with values")
    return content


def as_json(data: Any) -> str:
    """The text of a JSON file; ValueError for a NaN or an infinity."""
    return json.dumps(data, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def write_json(path: Path, data: Any) -> None:
    """Write JSON in UTF-8; ValueError for a NaN or an infinity.

    A name of a file that is no text keeps its bytes, in JSON's own notation.
    """
    try:
        text = as_json(data)
    except ValueError as error:
        raise ValueError(f"{path.name} would hold a number that is not finite: {error}") from error
    write_atomically(path, lambda p: p.write_text(text, encoding="utf-8", errors="backslashreplace"))


def hash_of_json(data: Any) -> str:
    """SHA-256 of plain data, whatever the order of its keys; values that JSON does not have count as their text."""
    return hashlib.sha256(json.dumps(data, sort_keys=True, default=str).encode()).hexdigest()


def hashed(data: Mapping[str, Any]) -> dict[str, Any]:
    """Plain data with its own hash as the key `sha256`."""
    plain = json.loads(json.dumps(data))  # as it will be read: keys are texts, tuples lists
    return {**plain, "sha256": hash_of_json(plain)}


def write_record(path: Path, data: Mapping[str, Any]) -> None:
    """Write a JSON object with its own hash."""
    write_json(path, hashed(data))


def read_record(path: Path) -> dict[str, Any]:
    """Read a file of `write_record`, with `read_json`'s errors; an object without hash is taken as it is."""
    data = read_json(path)
    if data.pop("sha256", None) not in (None, hash_of_json(data)):
        raise ValueError(f"{path} is damaged: it is not what was written")
    return data


def sha256_of(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def hash_path(path: Path) -> Path:
    """The file that holds the hash of a file."""
    return path.with_name(path.name + HASH)


def write_checked(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file and its hash, by which `intact` knows it: for work that may break off and be taken up again."""

    def hash_first(partial: Path) -> None:
        write(partial)
        digest = sha256_of(partial)
        write_atomically(hash_path(path), lambda other: other.write_text(digest, encoding="ascii"))

    write_atomically(path, hash_first)


def unchanged(path: Path) -> bool:
    """Whether a file is what `write_checked` wrote."""
    try:
        return hash_path(path).read_bytes().strip() == sha256_of(path).encode()
    except FileNotFoundError:
        return False


def intact(path: Path) -> bool:
    """Whether a file of work that broke off exists and can be used; one that cannot is named in the log."""
    if not path.is_file():
        return False
    if not (good := unchanged(path)):
        log.warning("%s was not written to its end, or is damaged: it is made again", path)
    return good

"""The sha256 of files. An index remembers those of files whose size, times and inode are what they were.

A file that is written to gets another time of its status (ctime), which no program can set: neither restoring the time of
modification nor writing as many bytes hides a change. The index is a cache in the user's own folder, may be deleted at any
time, and is made again when it is damaged; where it cannot be used, files are hashed each time.
"""

import hashlib
import logging
import os
import sqlite3
import stat
import struct
import time
import zlib
from collections.abc import Collection, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

PART = 1024  # files that are hashed before they are noted
YOUNG = (
    2_000_000_000  # ns: a file may change twice within a tick of the file system's context, so a young one is not noted
)
NOTICE, MUCH = 30.0, 2**32  # it is said how far it is after so many seconds, or before so many bytes
WAIT = 10.0  # seconds for other jobs that write to the index
TABLE = (
    "CREATE TABLE IF NOT EXISTS hashes (file BLOB PRIMARY KEY, times BLOB, sha256 BLOB, crc32 INTEGER) WITHOUT ROWID"
)
UNUSABLE = (sqlite3.Error, OSError, ValueError)  # the last for text in it that is no UTF-8
log = logging.getLogger(__name__)


class FileState(NamedTuple):
    """Which file it is, and what changes with its content."""

    file: bytes  # device and inode
    times: bytes  # size, times of modification and of the status
    size: int  # bytes
    changed: int  # the last of these, ns

    @classmethod
    def of(cls, path: Path) -> "FileState":
        """What the file system says.

        Raises:
            OSError: there is no such file, or it is out of reach.
            ValueError: a pipe, a socket, a device: reading would wait.
        """
        try:
            found = path.stat()
        except OSError as error:
            raise type(error)(f"cannot read {path}: {error.strerror}") from error
        if not stat.S_ISREG(found.st_mode):
            raise ValueError(f"{path} is no regular file")
        file = struct.pack("<QQ", found.st_dev % 2**64, found.st_ino % 2**64)
        times = struct.pack("<Qqq", found.st_size, found.st_mtime_ns, found.st_ctime_ns)
        return cls(file, times, found.st_size, found.st_ctime_ns)


class HashIndex:
    """A table of hashes in a file, which several jobs may use at a time.

    Args:
        path: the file; made if it is not there.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.database = self._open()

    def _open(self) -> sqlite3.Connection | None:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            database = sqlite3.connect(self.path, timeout=WAIT)
            database.execute(TABLE)
        except UNUSABLE as error:
            return self._without(error)
        return database

    def _without(self, error: Exception) -> None:
        """Go on without an index. One that is damaged is removed, so that the next job makes a new one."""
        log.info("hashes of files are not remembered: %s: %s", self.path, error)
        busy_or_out_of_reach = isinstance(error, OSError | sqlite3.OperationalError)
        if not busy_or_out_of_reach or getattr(error, "sqlite_errorcode", None) == sqlite3.SQLITE_ERROR:
            for path in (self.path, self.path.with_name(f"{self.path.name}-journal")):
                path.unlink(missing_ok=True)

    def find(self, states: Collection[FileState]) -> dict[FileState, bytes]:
        """The hashes of those files that are known and have not changed."""
        if self.database is None:
            return {}
        query = f"SELECT file, times, sha256, crc32 FROM hashes WHERE file IN ({','.join('?' * len(states))})"
        try:
            rows = self.database.execute(query, [state.file for state in states]).fetchall()
        except UNUSABLE as error:
            self.database = self._without(error)
            return {}
        known = {(file, times): sha256 for file, times, sha256, crc32 in rows if _crc32(file, times, sha256) == crc32}
        return {state: known[state[:2]] for state in states if state[:2] in known}

    def add(self, rows: Iterable[tuple[FileState, bytes]]) -> None:
        """Remember hashes."""
        if self.database is None:
            return
        try:
            with self.database:
                values = [(state.file, state.times, sha256, _crc32(*state[:2], sha256)) for state, sha256 in rows]
                self.database.executemany("INSERT OR REPLACE INTO hashes VALUES (?, ?, ?, ?)", values)
        except UNUSABLE as error:
            self.database = self._without(error)

    def __enter__(self) -> "HashIndex":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.database is not None:
            self.database.close()


def _crc32(*values: object) -> int:
    """A row's own checksum: a damaged one counts as none."""
    return zlib.crc32(repr(values).encode())


def default_index() -> Path:
    """Where the index is: `tfmq_exp/file_hashes.sqlite` in `$XDG_CACHE_HOME`, or in `~/.cache`."""
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(cache) / "tfmq_exp" / "file_hashes.sqlite"


def hash_files(root: Path, names: Sequence[str], index: Path | None = None) -> Iterator[bytes]:
    """The sha256 of each file, in order; several are read at a time.

    Args:
        root: the folder that they are in.
        names: their paths relative to it.
        index: the file that remembers hashes; None for that of the user.

    Raises:
        OSError: a file cannot be read; says which.
        ValueError: a file that is not a regular one, or is written to meanwhile.
    """
    said = time.monotonic()
    with HashIndex(index or default_index()) as known, ThreadPoolExecutor() as pool:
        for start in range(0, len(names), PART):
            part = [root / name for name in names[start : start + PART]]
            began, states = time.time_ns(), {path: FileState.of(path) for path in part}
            remembered = known.find(states.values())
            hashes = {path: remembered[state] for path, state in states.items() if state in remembered}
            missing = {path: state for path, state in states.items() if path not in hashes}
            much = sum(state.size for state in missing.values())
            if missing and (much > MUCH or time.monotonic() - said > NOTICE):
                said = time.monotonic()
                log.warning("hashing files of %s, once: %d of %d are done", root, start, len(names))
            hashes |= dict(zip(missing, pool.map(_hash, missing), strict=True))
            for path, state in missing.items():
                if FileState.of(path) != state:
                    raise ValueError(f"{path} was written to while it was read")
            known.add((state, hashes[path]) for path, state in missing.items() if began - state.changed > YOUNG)
            yield from (hashes[path] for path in part)


def hash_file(path: Path) -> str:
    """The sha256 of one file in hex digits; errors are those of `hash_files`."""
    return next(hash_files(path.parent, [path.name])).hex()


def _hash(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").digest()
    except OSError as error:
        raise type(error)(f"cannot read {path}: {error.strerror}") from error

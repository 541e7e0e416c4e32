"""SHA-256 of files, with an index of those of files whose size, times and inode have not changed.

A file that is written to gets another time of its status (ctime), which no program can set: neither restoring the time of
modification nor writing as many bytes hides a change. The index is a cache in the user's own folder, may be deleted at any
time, and is made again when it is damaged; where it cannot be used, files are hashed each time.
"""

import logging
import os
import sqlite3
import stat
import struct
import time
import zlib
from collections.abc import Collection, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TypeAlias

from tfmq_exp.core.files import sha256_of

PART = 1024  # files that are hashed before they are added to the index
YOUNG = 2e9  # ns: a file may change twice within a tick of the file system's clock, so young ones are not added
NOTICE, MUCH = 30.0, 2**32  # progress is logged after so many seconds, or before so many bytes
WAIT = 10.0  # seconds for other jobs that write to the index
TABLE = "CREATE TABLE IF NOT EXISTS states (state BLOB PRIMARY KEY, sha256 BLOB, crc32 INTEGER) WITHOUT ROWID"
State: TypeAlias = bytes  # of a file: all that changes when it or its content changes
log = logging.getLogger(__name__)


def _state_of(path: Path) -> tuple[State, os.stat_result]:
    with _naming(path):
        found = path.stat()
    if not stat.S_ISREG(found.st_mode):  # a pipe, a socket, a device: reading would wait
        raise ValueError(f"{path} is no regular file")
    place = found.st_dev % 2**64, found.st_ino % 2**64, found.st_size
    return struct.pack("<QQQqq", *place, found.st_mtime_ns, found.st_ctime_ns), found


class HashIndex:
    """A table of hashes in an SQLite file, which several jobs may use at a time; empty where the file cannot be used."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.database: sqlite3.Connection | None = None
        with self._tolerant():
            path.parent.mkdir(parents=True, exist_ok=True)
            self.database = sqlite3.connect(path, timeout=WAIT)
            self.database.execute(TABLE)

    @contextmanager
    def _tolerant(self) -> Iterator[None]:
        """Go on without an index after an error. A damaged one is removed, so that the next job makes a new one."""
        try:
            yield
        except (sqlite3.Error, OSError, ValueError) as error:  # the last for text in it that is no UTF-8
            log.info("hashes of files are not remembered: %s: %s", self.path, error)
            self.close()
            busy_or_out_of_reach = isinstance(error, OSError | sqlite3.OperationalError)
            if not busy_or_out_of_reach or getattr(error, "sqlite_errorcode", None) == sqlite3.SQLITE_ERROR:
                for path in (self.path, self.path.with_name(f"{self.path.name}-journal")):
                    path.unlink(missing_ok=True)

    def find(self, states: Collection[State]) -> dict[State, bytes]:
        """The hashes of those files that are known."""
        query = f"SELECT state, sha256, crc32 FROM states WHERE state IN ({','.join('?' * len(states))})"
        found: dict[State, bytes] = {}
        with self._tolerant():
            rows = self.database.execute(query, list(states)) if self.database else ()
            found = {state: sha256 for state, sha256, crc32 in rows if _crc32(state, sha256) == crc32}
        return {state: found[state] for state in states if state in found}

    def add(self, hashes: Iterable[tuple[State, bytes]]) -> None:
        rows = [(state, sha256, _crc32(state, sha256)) for state, sha256 in hashes]
        with self._tolerant():
            if self.database:
                with self.database:
                    self.database.executemany("INSERT OR REPLACE INTO states VALUES (?, ?, ?)", rows)

    def close(self) -> None:
        if self.database:
            self.database.close()
            self.database = None


def _crc32(*values: object) -> int:
    """A row's own checksum: a damaged one counts as none."""
    return zlib.crc32(repr(values).encode())


def default_index() -> Path:
    """The user's index: `tfmq_exp/file_hashes.sqlite` in `$XDG_CACHE_HOME`, or in `~/.cache`."""
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(cache) / "tfmq_exp" / "file_hashes.sqlite"


def hash_files(root: Path, names: Sequence[str], index: Path | None = None) -> Iterator[bytes]:
    """The sha256 of each file below `root`, in order; several are read at a time. `index` is by default the user's.

    Raises:
        OSError: a file cannot be read; says which.
        ValueError: a file that is not a regular one, or is written to meanwhile.
    """
    logged = time.monotonic()
    with closing(HashIndex(index or default_index())) as known, ThreadPoolExecutor() as pool:
        for start in range(0, len(names), PART):
            part = [root / name for name in names[start : start + PART]]
            began, found = time.time_ns(), {path: _state_of(path) for path in part}
            hashes = known.find([state for state, _ in found.values()])
            missing = [path for path, (state, _) in found.items() if state not in hashes]
            much = sum(found[path][1].st_size for path in missing) > MUCH
            if missing and (much or time.monotonic() - logged > NOTICE):
                logged = time.monotonic()
                log.warning("hashing files of %s, once: %d of %d are done", root, start, len(names))
            hashes |= dict(zip((found[path][0] for path in missing), pool.map(_hash, missing), strict=True))
            for path in missing:
                if _state_of(path)[0] != found[path][0]:
                    raise ValueError(f"{path} was written to while it was read")
            old = [found[path] for path in missing if began - found[path][1].st_ctime_ns > YOUNG]
            known.add((state, hashes[state]) for state, _ in old)
            yield from (hashes[found[path][0]] for path in part)


def hash_file(path: Path) -> str:
    """The sha256 of one file in hex digits; errors are those of `hash_files`."""
    return next(hash_files(path.parent, [path.name])).hex()


def _hash(path: Path) -> bytes:
    with _naming(path):
        return bytes.fromhex(sha256_of(path))


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise type(error)(f"cannot read {path}: {error.strerror}") from error

"""A content-addressed store: a stage's result lies under a hash of everything that it depends on.

    <root>/<stage>/<key>/manifest.json     written last; without it the entry is unfinished and will be resumed
                         inputs.json       what the key was made from
                         ...               the stage's files
                         ....sha256        hashes of parts, while the entry is unfinished: those that differ are made again

Same inputs, same key, no recomputation. A process killed at any moment leaves an unfinished entry, never a wrong one. The
manifest has the hash of every file and its own; finished entries are read without a lock, so a store may be read-only.
"""

import dataclasses
import hashlib
import importlib.util
import json
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from tfmq_exp.core.distributed import ALONE, ProcessGroup
from tfmq_exp.core.files import (
    HASH,
    hash_path,
    read_record,
    sha256_of,
    unchanged,
    write_checked,
    write_json,
    write_record,
)

SCHEMA = 3  # part of every key: raise it when the meaning of stored files changes
NOTED = {"stage", "key", "seconds", "files"}  # what a manifest says beside its own hash
log = logging.getLogger(__name__)


class DamagedEntry(ValueError):  # noqa: N818
    """A finished entry whose files are not what was written."""


def describe(value: Any) -> Any:
    """Plain data that identifies a record of choices: dataclasses with their class name, mappings sorted by JSON later.

    A class that is not the program's is identified by its module and its code, too: nobody raises `SCHEMA` for it.
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: describe(getattr(value, f.name)) for f in dataclasses.fields(value)}
        return {"class": type(value).__name__, **origin_of(type(value)), **fields}
    if isinstance(value, Mapping):
        return {str(k): describe(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [describe(v) for v in value]
    if value is None or isinstance(value, str | int | float | bool):
        return value
    raise TypeError(f"a {type(value).__name__} cannot be part of a key: make it a frozen dataclass")


def origin_of(kind: type) -> dict[str, str]:
    """Where a class is from, with a hash of the code there; nothing for the program's own."""
    package = kind.__module__.split(".")[0]
    if package == __name__.split(".")[0]:
        return {}
    code = code_of(package)
    return {"module": kind.__module__} | ({"code": code} if code else {})


def code_of(package: str) -> str | None:
    """Hash of the Python files of a module or package; None for what is installed, or has none."""
    spec = None if package == "__main__" else importlib.util.find_spec(package)
    if spec is None:
        return None
    folders = [Path(folder) for folder in spec.submodule_search_locations or ()]
    files = [file for folder in folders for file in sorted(folder.rglob("*.py"))]
    if not folders and spec.origin:
        files = [Path(spec.origin)]
    if any(part in ("site-packages", "dist-packages") for file in files for part in file.parts):
        return None
    existing = [file.read_bytes() for file in files if file.is_file()]
    return hashlib.sha256(b"\0".join(existing)).hexdigest()[:16] if existing else None


def key_of(stage: str, inputs: Mapping[str, Any]) -> str:
    """The first 16 hex digits of a hash that does not depend on the order of keys."""
    text = json.dumps({"stage": stage, "schema": SCHEMA, "inputs": inputs}, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@dataclasses.dataclass(frozen=True)
class Entry:
    """One result in the store, finished or not."""

    stage: str
    key: str
    path: Path
    inputs: Mapping[str, Any]

    @property
    def manifest(self) -> Path:
        """The file whose presence says that the entry is finished."""
        return self.path / "manifest.json"

    @property
    def done(self) -> bool:
        """Whether the entry is finished."""
        return self.manifest.is_file()

    @property
    def took(self) -> float | None:
        """Seconds that it took to make, if they were noted."""
        return self.noted.get("seconds") if self.done else None

    @property
    def noted(self) -> dict[str, Any]:
        """What the manifest says.

        Raises:
            DamagedEntry: it is no manifest, not what was written, or another entry's.
        """
        try:
            noted = read_record(self.manifest)
        except ValueError as error:
            raise self.damaged(self.manifest.name) from error
        if set(noted) != NOTED or noted["key"] != self.key:
            raise self.damaged(self.manifest.name)
        return noted

    @property
    def whole(self) -> bool:
        """Whether it is finished, and all files are there that the manifest names; their content is not looked at."""
        return self.done and all((self.path / name).is_file() for name in self.noted["files"])

    def verify(self, *names: str) -> None:
        """Compare files with their hashes: those that are named, or all.

        Raises:
            DamagedEntry: some file is missing or changed; says which, and how to have it made again.
        """
        wanted = self.noted["files"]
        for name in names or wanted:
            path = self.path / name
            if not path.is_file() or sha256_of(path) != wanted.get(name):
                raise self.damaged(name)

    def damaged(self, name: str) -> DamagedEntry:
        """The error that names a file."""
        return DamagedEntry(
            f"the stored {self.stage} is damaged: {self.path / name}; delete the folder {self.path} to have it made again"
        )

    def finish(self, seconds: float | None = None) -> None:
        """Mark the entry as finished, and note how long it took.

        Raises:
            DamagedEntry: a part has changed since it was written.
        """
        for path in self.path.rglob("*.partial"):  # of a process that was killed while it wrote
            path.unlink()
        files = [p for p in sorted(self.path.rglob("*")) if p.is_file() and p != self.manifest]
        parts = [path for path in files if path.suffix == HASH]
        kept = [path for path in files if path.suffix != HASH]
        for path in kept:
            if hash_path(path) in parts and not unchanged(path):
                raise DamagedEntry(f"{path} has changed since it was written: the next run makes it again")
        hashes = {path.relative_to(self.path).as_posix(): sha256_of(path) for path in kept}
        write_record(self.manifest, {"stage": self.stage, "key": self.key, "seconds": seconds, "files": hashes})
        self.remove_part_hashes()

    def remove_part_hashes(self) -> None:
        """Remove the hashes of parts, for which the manifest stands once it is there; where the store is read-only they stay."""
        for path in self.path.rglob(f"*{HASH}"):
            with suppress(OSError):
                path.unlink()

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other processes out; wait for one that is at work. A dead process's lock is gone with it."""
        lock = FileLock(self.path.with_suffix(".lock"))
        try:
            lock.acquire(timeout=0.1)
        except Timeout:
            log.warning("another process is making this %s (%s); waiting for it", self.stage, self.key)
            lock.acquire()
        try:
            yield
        finally:
            lock.release()


@dataclasses.dataclass(frozen=True)
class Store:
    """The store under a root folder, for one process or for several that make a run together."""

    root: Path
    processes: ProcessGroup = ALONE

    def entry(self, stage: str, inputs: Mapping[str, Any]) -> Entry:
        """Where the result of a stage with these inputs is, or will be."""
        plain = describe(inputs)
        key = key_of(stage, plain)
        return Entry(stage, key, self.root / stage / key, plain)

    def write(self, path: Path, write: Callable[[Path], object]) -> None:
        """Write a file that all processes have the content of: one is enough. Its hash lies beside it."""
        if self.processes.is_main:
            write_checked(path, write)

    def write_json(self, path: Path, data: Any) -> None:
        """The same for JSON."""
        if self.processes.is_main:
            write_json(path, data)

    def pull(
        self, entry: Entry, compute: Callable[[Path], None], seconds: Callable[[], float | None] = lambda: None
    ) -> bool:
        """Make sure that the entry is finished, and read it through; returns whether it had to be computed.

        `compute` fills the folder, together with other processes if there are any; it finds there what an interrupted
        attempt has left. `seconds` is asked afterwards how long that took.

        Raises:
            DamagedEntry: it is finished, and some file is not what was written.
        """
        if self._found(entry):
            return False
        entry.path.mkdir(parents=True, exist_ok=True)
        with entry.locked() if self.processes.is_main else nullcontext():
            if self._found(entry):  # another job has made it meanwhile
                return False
            self.write_json(entry.path / "inputs.json", entry.inputs)
            compute(entry.path)
            self.processes.barrier()
            if self.processes.is_main:
                entry.finish(seconds())
            self.processes.barrier()
            return True

    def _found(self, entry: Entry) -> bool:
        if not self.processes.broadcast(entry.done):
            return False
        if self.processes.is_main:
            entry.verify()
            entry.remove_part_hashes()  # of a process that was killed between the manifest and this
        return True

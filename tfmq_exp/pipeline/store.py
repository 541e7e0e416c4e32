"""Content-addressed store: the result of a stage lies under a hash of everything that it depends on.

    <root>/<stage>/<key>/manifest.json     written last; without it the entry is unfinished, and the next run resumes it
                         inputs.json       what the key was made from
                         ...               the stage's files
                         ....sha256        hashes of single files of an unfinished entry: those that differ are made again

A process killed at any moment leaves an unfinished entry, never a wrong one. The manifest has the hash of every file and
its own; finished entries are read without a lock, so a store may be read-only.
"""

import dataclasses
import hashlib
import importlib.util
import json
import logging
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from tfmq_exp.core import files
from tfmq_exp.core.distributed import ALONE, ProcessGroup
from tfmq_exp.core.files import HASH, sha256_of

SCHEMA = 4  # part of every key: raise it when the meaning of stored files changes
MANIFEST = "manifest.json"  # its presence means that an entry is finished
MANIFEST_KEYS = {"stage", "key", "seconds", "files"}  # besides the manifest's own hash
log = logging.getLogger(__name__)


class DamagedEntry(ValueError):  # noqa: N818
    """A finished entry whose files are not what was written."""


def canonical(value: Any) -> Any:
    """Plain data that identifies a value: dataclasses with their class name; TypeError for what is neither.

    A class from outside the program counts with its module and the hash of its code, which `SCHEMA` does not follow.
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        module = type(value).__module__
        package, own = module.split(".")[0], __name__.split(".")[0]
        origin = {} if package == own else {"module": module, "code": code_of(package)}
        fields = {f.name: canonical(getattr(value, f.name)) for f in dataclasses.fields(value)}
        return {"class": type(value).__name__, **origin, **fields}
    if isinstance(value, Mapping):
        return {str(k): canonical(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [canonical(v) for v in value]
    if value is None or isinstance(value, str | int | float | bool):
        return value
    raise TypeError(f"a {type(value).__name__} cannot be part of a key: make it a frozen dataclass")


def code_of(package: str) -> str | None:
    """Hash of the Python files of a module or package; None for an installed one, or one without files."""
    spec = None if package == "__main__" else importlib.util.find_spec(package)
    if spec is None:
        return None
    folders = [Path(folder) for folder in spec.submodule_search_locations or ()]
    paths = [path for folder in folders for path in sorted(folder.rglob("*.py"))] or [Path(spec.origin or "")]
    if any({"site-packages", "dist-packages"}.intersection(path.parts) for path in paths):
        return None
    existing = [path.read_bytes() for path in paths if path.is_file()]
    return hashlib.sha256(b"\0".join(existing)).hexdigest()[:16] if existing else None


def key_of(stage: str, inputs: Mapping[str, Any]) -> str:
    """The first 16 hex digits of a hash that does not depend on the order of the inputs."""
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
    def done(self) -> bool:
        """Whether the entry is finished."""
        return (self.path / MANIFEST).is_file()

    @property
    def seconds(self) -> float | None:
        """Seconds of computing it, if it is finished and they are known."""
        return self.manifest["seconds"] if self.done else None

    @property
    def manifest(self) -> dict[str, Any]:
        """Content of the manifest; DamagedEntry for another file, another entry's, or one that has changed."""
        with suppress(ValueError):
            manifest = files.read_record(self.path / MANIFEST)
            if set(manifest) == MANIFEST_KEYS and manifest["key"] == self.key:
                return manifest
        raise self._damaged(MANIFEST)

    @property
    def complete(self) -> bool:
        """Whether it is finished and all files of the manifest are there; their content is not read."""
        return self.done and all((self.path / name).is_file() for name in self.manifest["files"])

    def verify(self, *names: str) -> None:
        """Compare the named files, or all, with their hashes; DamagedEntry names one that is missing or changed."""
        hashes = self.manifest["files"]
        for name in names or hashes:
            path = self.path / name
            if not path.is_file() or sha256_of(path) != hashes.get(name):
                raise self._damaged(name)

    def _damaged(self, name: str) -> DamagedEntry:
        return DamagedEntry(
            f"the stored {self.stage} is damaged: {self.path / name}; delete the folder {self.path} to have it made again"
        )

    def finish(self, seconds: float | None = None) -> None:
        """Write the manifest; DamagedEntry where a file with a hash of its own has changed since it was written."""
        for path in self.path.rglob("*.partial"):  # of a process that was killed while it wrote
            path.unlink()
        hashes = {}
        for path in sorted(p for p in self.path.rglob("*") if p.is_file()):
            if path.suffix == HASH or path == self.path / MANIFEST:
                continue
            if files.hash_path(path).is_file() and not files.unchanged(path):
                raise DamagedEntry(f"{path} has changed since it was written: the next run makes it again")
            hashes[path.relative_to(self.path).as_posix()] = sha256_of(path)
        manifest = {"stage": self.stage, "key": self.key, "seconds": seconds, "files": hashes}
        files.write_record(self.path / MANIFEST, manifest)
        self.remove_file_hashes()

    def remove_file_hashes(self) -> None:
        """Remove the hashes beside single files, which the manifest has; in a read-only store they stay."""
        for path in self.path.rglob(f"*{HASH}"):
            with suppress(OSError):
                path.unlink()

    def locked(self) -> AbstractContextManager[Any]:
        """Take the entry's lock for a block; wait while another process holds it. A dead process's lock is gone with it."""
        lock = FileLock(self.path.with_suffix(".lock"))
        try:
            return lock.acquire(timeout=0.1)
        except Timeout:
            log.warning("another process is making this %s (%s); waiting for it", self.stage, self.key)
            return lock.acquire()


@dataclasses.dataclass(frozen=True)
class Store:
    """The store under a root folder, for one process or for a group that makes a run together."""

    root: Path
    group: ProcessGroup = ALONE

    def entry(self, stage: str, inputs: Mapping[str, Any]) -> Entry:
        """Place of the result of a stage with these inputs."""
        plain = canonical(inputs)
        key = key_of(stage, plain)
        return Entry(stage, key, self.root / stage / key, plain)

    def write(self, path: Path, write: Callable[[Path], object]) -> None:
        """Write a file with its hash beside it, from the main process alone."""
        if self.group.is_main:
            files.write_checked(path, write)

    def write_json(self, path: Path, data: Any) -> None:
        """Write JSON from the main process alone."""
        if self.group.is_main:
            files.write_json(path, data)

    def get_or_compute(
        self, entry: Entry, compute: Callable[[Path], None], seconds: Callable[[], float | None] = lambda: None
    ) -> bool:
        """Make sure that the entry is finished and unchanged (else DamagedEntry); returns whether it had to be computed.

        `compute` fills the folder, in all processes of the group, and finds there what an interrupted attempt has left.
        `seconds` gives the time that it took, and is asked afterwards.
        """
        if self._found(entry):
            return False
        entry.path.mkdir(parents=True, exist_ok=True)
        with entry.locked() if self.group.is_main else nullcontext():
            if self._found(entry):  # another job has made it meanwhile
                return False
            self.write_json(entry.path / "inputs.json", entry.inputs)
            compute(entry.path)
            self.group.barrier()
            if self.group.is_main:
                entry.finish(seconds())
            self.group.barrier()
            return True

    def _found(self, entry: Entry) -> bool:
        if not self.group.broadcast(entry.done):
            return False
        if self.group.is_main:
            entry.verify()
            entry.remove_file_hashes()  # of a process that was killed between the manifest and this
        return True

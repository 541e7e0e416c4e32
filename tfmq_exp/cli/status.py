"""Job status file: `status.json` in the run folder, written when a job begins and when it ends.

A job that is killed cannot write that it ended. It loses its lock, though, by which others can tell.
"""

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Literal

from filelock import FileLock, Timeout

from tfmq_exp.core.files import as_json, hashed, read_record, write_atomically

State = Literal["running", "done", "found", "planned", "failed", "interrupted", "died"]
GOOD: tuple[State, ...] = ("done", "found", "planned")
RESERVED = 4096  # bytes of a status, filled up with blanks: on a full disk they are left for the status at the end
LOCK_TIMEOUT = 10.0  # seconds that a job which is started again waits for the end of its predecessor


@dataclass(frozen=True)
class Status:
    """Status of one job."""

    state: State  # found: an identical job was done before; planned: dry run; died: it neither ended nor runs
    name: str  # of the run folder
    number: int | None  # place in a sweep
    pid: int  # of the process that ran it, on `host`
    host: str
    began: str  # local time, ISO 8601; so is `ended`
    ended: str | None = None
    reason: str = ""  # why it failed, in a line; of a found job, the folder of the job that did the work

    @property
    def seconds(self) -> float | None:
        """Duration from beginning to end; None while the job runs."""
        if self.ended is None:
            return None
        return (datetime.fromisoformat(self.ended) - datetime.fromisoformat(self.began)).total_seconds()

    def turned(self, state: State, reason: str = "") -> "Status":
        """The same job, ended now."""
        return replace(self, state=state, ended=now(), reason=reason)

    def write(self, folder: Path) -> None:
        """Write into a run folder; on a full disk into the bytes of the status that is there already.

        Raises:
            OSError: the disk is full and there is no earlier status, or the folder is read-only.
        """
        path = folder / "status.json"
        brief = replace(self, reason=self.reason[: RESERVED // 8])  # a character has up to four bytes
        whole, short = (as_json(hashed(asdict(status))).encode().ljust(RESERVED) for status in (self, brief))
        try:
            write_atomically(path, lambda partial: partial.write_bytes(whole))
        except OSError:
            if not path.is_file() or path.stat().st_size < len(short):
                raise
            with path.open("r+b") as file:
                file.write(short)
                file.truncate()


def now() -> str:
    """Local time with its offset, in milliseconds."""
    return datetime.now().astimezone().isoformat(timespec="milliseconds")


def begun(name: str, number: int | None) -> Status:
    """Status of a job that this process begins."""
    return Status("running", name, number, os.getpid(), socket.gethostname(), now())


@contextmanager
def occupied(folder: Path) -> Iterator[None]:
    """Keep other processes out of a run folder; ValueError where one works in it."""
    try:
        lock = FileLock(folder / ".running.lock").acquire(timeout=LOCK_TIMEOUT)
    except Timeout:
        raise ValueError(f"another process works in {folder}; choose another folder with hydra.run.dir=...") from None
    with lock:
        yield


def read_status(folder: Path) -> Status:
    """Status of the job of a run folder.

    Raises:
        OSError, ValueError, TypeError: there is no status, or it is no status.
    """
    status = Status(**read_record(folder / "status.json"))
    if status.state != "running":
        return status
    try:
        with FileLock(folder / ".running.lock").acquire(timeout=0):
            status = Status(**read_record(folder / "status.json"))  # it may have ended since
    except Timeout:
        return status
    reason = f"process {status.pid} on {status.host} is gone: killed, or out of memory"
    return replace(status, state="died", reason=reason) if status.state == "running" else status

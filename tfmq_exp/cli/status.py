"""Job status file: `status.json` in the run folder, written when a job begins and when it ends.

A job that is killed cannot write that it ended. It loses its lock, though, by which others can tell.
"""

import dataclasses
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
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
    """Status of one job.

    Args:
        state: found: an identical job was done before; planned: dry run; died: it neither ended nor runs.
        name: of the run folder.
        number: place in a sweep.
        pid: of the process that ran it, on `host`.
        began: local time, ISO 8601; so is `ended`.
        reason: why it failed, in a line; of a found job, the folder of the job that did the work.
    """

    state: State
    name: str
    number: int | None
    pid: int
    host: str
    began: str
    ended: str | None = None
    reason: str = ""

    @property
    def seconds(self) -> float | None:
        """Duration from beginning to end; None while the job runs."""
        if self.ended is None:
            return None
        return (datetime.fromisoformat(self.ended) - datetime.fromisoformat(self.began)).total_seconds()

    def turned(self, state: State, reason: str = "") -> "Status":
        """The same job, ended now."""
        return dataclasses.replace(self, state=state, ended=now(), reason=reason)

    def write(self, folder: Path) -> None:
        """Write into a run folder; on a full disk into the bytes of the status that is there already.

        Raises:
            OSError: the disk is full and there is no earlier status, or the folder is read-only.
        """
        path = folder / "status.json"
        brief = dataclasses.replace(self, reason=self.reason[: RESERVED // 8])  # a character has up to four bytes
        whole, short = (as_json(hashed(dataclasses.asdict(s))).encode().ljust(RESERVED) for s in (self, brief))
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
    """Keep other processes out of a run folder.

    Raises:
        ValueError: another process works in it.
    """
    lock = FileLock(folder / ".running.lock")
    try:
        lock.acquire(timeout=LOCK_TIMEOUT)
    except Timeout:
        raise ValueError(f"another process works in {folder}; choose another folder with hydra.run.dir=...") from None
    try:
        yield
    finally:
        lock.release()


def read_status(folder: Path) -> Status:
    """Status of the job of a run folder.

    Raises:
        OSError, ValueError, TypeError: there is no status, or it is no status.
    """
    path = folder / "status.json"
    status = Status(**read_record(path))
    if status.state != "running":
        return status
    try:
        with FileLock(folder / ".running.lock").acquire(timeout=0):
            status = Status(**read_record(path))  # it may have ended since
    except Timeout:
        return status
    reason = f"process {status.pid} on {status.host} is gone: killed, or out of memory"
    return dataclasses.replace(status, state="died", reason=reason) if status.state == "running" else status

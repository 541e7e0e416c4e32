"""What became of a job: `status.json` in its run folder, written when it begins and when it ends.

A job that is killed cannot write that it ended. It loses its lock, though, and so everyone can tell.
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
ROOM = 4096  # bytes of a status, filled up with blanks: a full disk has that room still when the job ends
PATIENCE = 10.0  # seconds that a job which is started again waits for the end of its predecessor


@dataclass(frozen=True)
class Status:
    """One job's.

    Args:
        state: found: an earlier job had done the same; planned: it was asked only what it would do; died: it neither
            ended nor runs.
        name: what people call it.
        number: its place in a sweep.
        pid: of the process that ran it, on `host`.
        began: local time, ISO 8601; so is `ended`.
        reason: why it failed, in a line; of a found job, the folder of the one that did the work.
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
        """From beginning to end."""
        if self.ended is None:
            return None
        return (datetime.fromisoformat(self.ended) - datetime.fromisoformat(self.began)).total_seconds()

    def turned(self, state: State, reason: str = "") -> "Status":
        """The same job, ended now."""
        return dataclasses.replace(self, state=state, ended=now(), reason=reason)

    def write(self, folder: Path) -> None:
        """Into a run folder; on a full disk into the room of the status that is there already.

        Raises:
            OSError: there is no room, and no earlier status; or the folder is read-only.
        """
        path = folder / "status.json"
        brief = dataclasses.replace(self, reason=self.reason[: ROOM // 8])  # up to four bytes for a character
        whole, short = (as_json(hashed(dataclasses.asdict(status))).encode().ljust(ROOM) for status in (self, brief))
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
    """Of a job that this process begins."""
    return Status("running", name, number, os.getpid(), socket.gethostname(), now())


@contextmanager
def occupied(folder: Path) -> Iterator[None]:
    """Have the run folder for oneself.

    Raises:
        ValueError: another process works in it.
    """
    lock = FileLock(folder / ".running.lock")
    try:
        lock.acquire(timeout=PATIENCE)
    except Timeout:
        raise ValueError(f"another process works in {folder}; choose another folder with hydra.run.dir=...") from None
    try:
        yield
    finally:
        lock.release()


def read_status(folder: Path) -> Status:
    """What became of the job of a run folder.

    Raises:
        OSError, ValueError, TypeError: there is no status, or it is no status.
    """
    status = noted(folder)
    if status.state != "running":
        return status
    lock = FileLock(folder / ".running.lock")
    try:
        with lock.acquire(timeout=0):
            status = noted(folder)  # it may have ended since
    except Timeout:
        return status
    reason = f"process {status.pid} on {status.host} is gone: killed, or out of memory"
    return dataclasses.replace(status, state="died", reason=reason) if status.state == "running" else status


def noted(folder: Path) -> Status:
    """What the file says."""
    return Status(**read_record(folder / "status.json"))

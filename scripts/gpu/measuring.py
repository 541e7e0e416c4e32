"""Clock, seconds and memory of a device, and the rows of a report."""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from tfmq_exp.reconstruction.context import peak_memory_mib


class Row(NamedTuple):
    """One measured number; `note` is its tolerance, or how it was made."""

    what: str
    value: float | str
    unit: str = ""
    note: str = ""


class Part(NamedTuple):
    """Some rows that are measured together, within about so many seconds on a GPU."""

    name: str
    seconds: float
    work: Callable[[], Sequence[Row]]


class Clock:
    """Time until some minutes from now are over."""

    def __init__(self, minutes: float) -> None:
        self.end = time.perf_counter() + 60 * minutes

    @property
    def left(self) -> float:
        """Seconds."""
        return self.end - time.perf_counter()


def synchronize(device: torch.device) -> None:
    """Wait for all work of a device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds_of(work: Callable[[], object], device: torch.device, repeats: int, warm_up: int = 1) -> float:
    """Mean seconds of a call over some that follow each other without waiting, after others that are not counted."""
    for _ in range(warm_up):
        work()
    synchronize(device)
    began = time.perf_counter()
    for _ in range(repeats):
        work()
    synchronize(device)
    return (time.perf_counter() - began) / repeats


def peak_gib(device: torch.device) -> float:
    """Peak memory in GiB: of the device's tensors since the last call, or of this process on a CPU."""
    if device.type != "cuda":
        return peak_memory_mib() / 2**10
    peak = torch.cuda.max_memory_allocated(device) / 2**30
    torch.cuda.reset_peak_memory_stats(device)
    return peak


def run_part(part: Part, clock: Clock, device: torch.device, *, patient: bool) -> Mapping[str, Any]:
    """Rows of a part, or why there are none: it would not be done in time, or it failed.

    Args:
        part: to run.
        clock: time that is left.
        device: whose peak memory is measured, too.
        patient: run it whatever the clock says.
    """
    if clock.left < part.seconds and not patient:
        return {"part": part.name, "status": f"skipped: {clock.left:.0f} s left", "rows": []}
    peak_gib(device)
    began = time.perf_counter()
    try:
        rows, status = list(part.work()), "done"
    except Exception as error:  # the other parts can still be measured
        rows, status = [], f"failed: {type(error).__name__}: {' '.join(str(error).split()):.300}"
    taken = time.perf_counter() - began
    rows += [Row("peak memory", peak_gib(device), "GiB")] if rows else []
    return {"part": part.name, "status": status, "seconds": taken, "rows": [row._asdict() for row in rows]}


def markdown(found: Mapping[str, Any]) -> str:
    """The report as tables."""
    lines = ["# GPU benchmark", "", *(f"- {name}: {value}" for name, value in found["machine"].items()), ""]
    lines += ["| part | measured | value | unit | note |", "|---|---|---:|---|---|"]
    for part in found["parts"]:
        for row in part["rows"]:
            value = row["value"] if isinstance(row["value"], str) else f"{row['value']:.4g}"
            lines.append(f"| {part['part']} | {row['what']} | {value} | {row['unit']} | {row['note']} |")
        if part["status"] != "done":
            lines.append(f"| {part['part']} | **{part['status']}** | | | |")
    return "\n".join([*lines, ""])

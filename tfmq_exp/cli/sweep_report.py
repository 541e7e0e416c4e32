"""The end of a sweep: what became of every job, whoever ran it, read from the run folders."""

import atexit
import dataclasses
import json
import math
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from hydra.experimental.callback import Callback
from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table

from tfmq_exp.cli.outcome import discard_plan
from tfmq_exp.cli.score_table import show_sweep
from tfmq_exp.cli.signals import interruptible
from tfmq_exp.cli.status import GOOD, State, read_status
from tfmq_exp.cli.terminal import Terminal, say
from tfmq_exp.core.files import write_json
from tfmq_exp.core.formatting import format_duration
from tfmq_exp.report.records import ScoreRecord, read_records

ORDER: tuple[State, ...] = ("done", "found", "planned", "running", "failed", "interrupted", "died")


@dataclass(frozen=True)
class Job:
    """One job of a sweep.

    Args:
        seconds: from its beginning to its end; None if it has no end.
        asked: stages that it needed; the other jobs may have needed the same.
        computed: those that it made.
        expected: seconds that a dry run has estimated for the missing ones.
    """

    folder: Path
    number: int | None
    state: State
    reason: str = ""
    seconds: float | None = None
    asked: int = 0
    computed: int = 0
    expected: float = 0.0


def read_job(folder: Path) -> Job:
    """A run folder; a job that died before it could write anything has an empty one."""
    artifacts, estimate = folder / "artifacts.json", folder / "estimate.json"
    try:
        status = read_status(folder)
        stages: dict[str, Any] = json.loads(artifacts.read_text(encoding="utf-8")) if artifacts.is_file() else {}
        computed = sum(stage["computed"] for stage in stages.values())
        expected = json.loads(estimate.read_text(encoding="utf-8"))["seconds"] if estimate.is_file() else 0.0
    except FileNotFoundError:
        return Job(folder, None, "died", "it ended before it began")
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        return Job(folder, None, "died", f"its files cannot be read: {error}")
    return Job(folder, status.number, status.state, status.reason, status.seconds, len(stages), computed, expected)


def read_jobs(root: Path) -> list[Job]:
    """All jobs of a sweep that have begun, in its order."""
    jobs = [read_job(path.parent) for path in root.rglob(".hydra")]
    return sorted(jobs, key=lambda job: (job.number is None, job.number, job.folder))


def how_many(config: DictConfig) -> int | None:
    """Jobs that the sweep is to have; None where its sweeper is not Hydra's own, or cannot say so yet."""
    sweeper = config.hydra.sweeper
    if not str(sweeper.get("_target_", "")).endswith(".BasicSweeper"):
        return None
    given = [f"{key}={values}" for key, values in (sweeper.get("params") or {}).items()]
    try:
        parsed = OverridesParser.create().parse_overrides([*given, *config.hydra.overrides.task])
        sizes = {o.get_key_element(): len(list(o.sweep_string_iterator())) for o in parsed if o.is_sweep_override()}
    except (HydraException, TypeError, AssertionError):  # a pattern for names of files, say
        return None
    return math.prod(sizes.values())


def scored(jobs: Sequence[Job]) -> list[ScoreRecord]:
    """The results of those that have some, each once; damaged files are left to the tables that are asked for."""
    readable: list[Path] = []
    for path in (job.folder / "results.json" for job in jobs if job.state in ("done", "found")):
        with suppress(ValueError, OSError):
            readable += [path] if path.is_file() and read_records(path) else []
    return read_records(*readable)


def summary(jobs: Sequence[Job], seconds: float) -> str:
    """One line."""
    counts = Counter(job.state for job in jobs)
    states = ", ".join(f"{counts[state]} {state}" for state in ORDER if counts[state])
    computed, asked = sum(job.computed for job in jobs), sum(job.asked for job in jobs)
    told = [f"{computed} of {asked} stages computed"] if counts["planned"] < len(jobs) else []
    if counts["planned"]:
        expected = format_duration(sum(job.expected for job in jobs))
        told.append(f"estimate: {expected}, each job by itself (stages that several share are made once)")
    return "; ".join([f"{len(jobs)} jobs: {states}", *told, str(timedelta(seconds=round(seconds)))])


def show(jobs: Sequence[Job], seconds: float, console: Console) -> None:
    """A row for every job, the reasons of those that are not well, and the sums."""
    view = Table(title="sweep", title_justify="left")
    for name in ("job", "state", "computed / stages", "time"):
        view.add_column(name, justify="left" if name in ("job", "state") else "right", overflow="fold")
    for job in jobs:
        took = "" if job.seconds is None else str(timedelta(seconds=round(job.seconds)))
        view.add_row(job.folder.name, job.state, f"{job.computed} / {job.asked}", took)
    console.print(view)
    for job in jobs:
        if job.state not in GOOD:
            say(console, f"{job.state}: {job.folder}: {job.reason}")
    say(console, summary(jobs, seconds))


class SweepReport(Callback):
    """Hydra calls it when a sweep begins and when it ends; `sweep.json` in the sweep's folder holds the same.

    A launcher whose worker was killed ends the sweep without that second call, hence the look when the process ends.
    """

    def __getstate__(self) -> dict[str, Any]:
        """Nothing: launchers send a copy with every job, and it has nothing to report there."""
        return {}

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        """From here on there is something to report."""
        self.folder, self.began = Path(config.hydra.sweep.dir).absolute(), time.monotonic()
        self.asked = how_many(config)
        self.uninterruptible = interruptible(self.cut_short)
        atexit.register(self.cut_short)

    def on_multirun_end(self, config: DictConfig, **_: Any) -> None:
        """All jobs have ended. Dry runs leave no folders.

        Raises:
            SystemExit: with status 1, where some did not end well.
        """
        atexit.unregister(self.cut_short)
        self.uninterruptible()
        jobs = self.report(Terminal())
        for job in jobs:
            if job.state == "planned":
                discard_plan(job.folder)
        if any(job.state not in GOOD for job in jobs):
            raise SystemExit(1)

    def cut_short(self) -> None:
        """The launcher gave up."""
        atexit.unregister(self.cut_short)
        console = Terminal()
        jobs = self.report(console)
        if jobs:
            if self.asked is not None and self.asked > len(jobs):
                say(console, f"{self.asked - len(jobs)} of {self.asked} jobs never started")
            text = (
                "the sweep was cut short; run the same command again: what is finished is found, what was begun goes on"
            )
            say(console, text)

    def report(self, console: Console) -> list[Job]:
        """Show and write what became of the jobs."""
        jobs, seconds = read_jobs(self.folder), time.monotonic() - self.began
        if jobs:
            show(jobs, seconds, console)
            rows = [{**dataclasses.asdict(job), "folder": str(job.folder)} for job in jobs]
            write_json(self.folder / "sweep.json", {"seconds": round(seconds, 1), "jobs": rows})
            show_sweep(scored(jobs), self.folder, console)
        return jobs

"""Report of a sweep: the state of every job, read from the run folders, whichever process ran it."""

import atexit
import dataclasses
import math
import multiprocessing
import os
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from hydra.experimental.callback import Callback
from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table

from tfmq_exp.cli.job import discard_plan, stop
from tfmq_exp.cli.outputs.score_table import print_sweep_scores
from tfmq_exp.cli.status import GOOD, State, read_status
from tfmq_exp.cli.terminal import Terminal, say
from tfmq_exp.core.files import read_json, write_json
from tfmq_exp.core.formatting import format_duration
from tfmq_exp.report.records import ScoreRecord, read_records

ORDER: tuple[State, ...] = ("done", "found", "planned", "running", "failed", "interrupted", "died")
DEFAULTS = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}


@dataclass(frozen=True)
class Job:
    """One job of a sweep."""

    folder: Path
    number: int | None
    state: State
    reason: str = ""
    seconds: float | None = None  # from its beginning to its end; None if it has no end
    asked: int = 0  # number of stages that it needed; other jobs may have needed the same
    computed: int = 0  # number of those that it computed
    expected: float = 0.0  # seconds that a dry run has estimated for the missing stages


def read_job(folder: Path) -> Job:
    """Job of a run folder; one that died before it could write anything has an empty folder."""
    try:
        status = read_status(folder)
        stages, plan = (
            read_json(p) if p.is_file() else {} for p in (folder / "artifacts.json", folder / "estimate.json")
        )
        computed, expected = sum(stage["computed"] for stage in stages.values()), plan.get("seconds", 0.0)
    except FileNotFoundError:
        return Job(folder, None, "died", "it ended before it began")
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        return Job(folder, None, "died", f"its files cannot be read: {error}")
    return Job(folder, status.number, status.state, status.reason, status.seconds, len(stages), computed, expected)


def read_jobs(root: Path) -> list[Job]:
    """All jobs of a sweep that have begun, in its order."""
    jobs = [read_job(path.parent) for path in root.rglob(".hydra")]
    return sorted(jobs, key=lambda job: (job.number is None, job.number, job.folder))


def job_count(config: DictConfig) -> int | None:
    """Number of jobs of the sweep; None where its sweeper is not Hydra's own, or cannot say so yet."""
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
    """Results of all jobs that have some, each once; damaged files are left out."""
    readable: list[Path] = []
    for path in (job.folder / "results.json" for job in jobs if job.state in ("done", "found")):
        with suppress(ValueError, OSError):
            readable += [path] if path.is_file() and read_records(path) else []
    return read_records(*readable)


def summary(jobs: Sequence[Job], seconds: float) -> str:
    """Numbers of jobs and stages, or the estimate of a dry run, in one line."""
    counts = Counter(job.state for job in jobs)
    parts = [f"{len(jobs)} jobs: {', '.join(f'{counts[state]} {state}' for state in ORDER if counts[state])}"]
    if counts["planned"] < len(jobs):
        parts.append(f"{sum(job.computed for job in jobs)} of {sum(job.asked for job in jobs)} stages computed")
    if counts["planned"]:
        expected = format_duration(sum(job.expected for job in jobs))
        parts.append(f"estimate: {expected}, each job by itself (stages that several share are made once)")
    return "; ".join([*parts, str(timedelta(seconds=round(seconds)))])


def print_jobs(jobs: Sequence[Job], seconds: float, console: Console) -> None:
    """Print a row for every job, why jobs did not end well, and the sums."""
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
    """Hydra callback at the beginning and the end of a sweep; `sweep.json` in the sweep's folder has the same as the terminal.

    A launcher whose worker was killed ends the sweep without the second call, hence the report at the end of the process.
    """

    def __getstate__(self) -> dict[str, Any]:
        """Nothing: launchers send a copy with every job, and it has nothing to report there."""
        return {}

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        """Start the clock."""
        self.folder, self.began = Path(config.hydra.sweep.dir).absolute(), time.monotonic()
        self.asked = job_count(config)
        self.handlers = ExitStack()
        self.handlers.enter_context(interruptible(self.cut_short))
        atexit.register(self.cut_short)

    def on_multirun_end(self, config: DictConfig, **_: Any) -> None:
        """Report, and end with status 1 where some job did not end well. Dry runs leave no folders."""
        atexit.unregister(self.cut_short)
        self.handlers.close()
        jobs = self.report(Terminal())
        for job in jobs:
            if job.state == "planned":
                discard_plan(job.folder)
        if any(job.state not in GOOD for job in jobs):
            raise SystemExit(1)

    def cut_short(self) -> None:
        """Report a sweep whose launcher gave up."""
        atexit.unregister(self.cut_short)
        console = Terminal()
        if jobs := self.report(console):
            if self.asked is not None and self.asked > len(jobs):
                say(console, f"{self.asked - len(jobs)} of {self.asked} jobs never started")
            remedy = "run the same command again: what is finished is found, what was begun goes on"
            say(console, f"the sweep was cut short; {remedy}")

    def report(self, console: Console) -> list[Job]:
        """Print and write the state of the jobs, and their scores."""
        jobs, seconds = read_jobs(self.folder), time.monotonic() - self.began
        if jobs:
            print_jobs(jobs, seconds, console)
            rows = [{**dataclasses.asdict(job), "folder": str(job.folder)} for job in jobs]
            write_json(self.folder / "sweep.json", {"seconds": round(seconds, 1), "jobs": rows})
            print_sweep_scores(scored(jobs), self.folder, console)
        return jobs


@contextmanager
def interruptible(on_abort: Callable[[], object]) -> Iterator[None]:
    """Let the first Ctrl-C or SIGTERM end several jobs in order, and the second Ctrl-C at once, after `on_abort`.

    Signals that are handled already are left to their handlers.
    """
    before, excepthook = {number: signal.getsignal(number) for number in DEFAULTS}, sys.excepthook

    def second(number: int, _: FrameType | None) -> None:
        on_abort()
        for child in multiprocessing.active_children():
            child.kill()
        sys.stdout.flush()
        os._exit(128 + number)  # otherwise a parent that waits for a worker would hang

    def first(_number: int, _: FrameType | None) -> None:
        signal.signal(signal.SIGINT, second)
        raise KeyboardInterrupt

    def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if not issubclass(kind, KeyboardInterrupt):  # a traceback of Ctrl-C helps nobody
            excepthook(kind, error, trace)

    for number, handler in {signal.SIGINT: first, signal.SIGTERM: stop}.items():
        if before[number] is DEFAULTS[number]:
            signal.signal(number, handler)
    sys.excepthook = hook
    try:
        yield
    finally:
        sys.excepthook = excepthook
        for number, handler in before.items():
            signal.signal(number, handler)

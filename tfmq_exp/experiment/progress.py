"""What a person sees while a run works: a bar per stage, with what it is at and the time left."""

import logging
import multiprocessing
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from tfmq_exp.experiment.words import in_words

log = logging.getLogger(__name__)

Advance = Callable[[float, str], None]


class Bars:
    """Progress bars on a terminal; elsewhere a log line when a stage ends.

    Jobs that share a terminal would paint over each other's bars: they write a line when a stage ends.
    """

    def __init__(self, console: Console) -> None:
        self.console, self.worker = console, worker_name()
        self.seconds: dict[str, float] = {}

    @contextmanager
    def stage(self, name: str, total: float) -> Iterator[Advance]:
        """A bar that counts to `total`. Call the result with how far the work is and what it is at."""
        columns = (
            TextColumn("{task.description:<14}"),
            BarColumn(bar_width=28),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}", style="dim"),
        )
        began = time.perf_counter()
        with Progress(
            *columns, console=self.console, disable=bool(self.worker) or not self.console.is_terminal
        ) as progress:
            task = progress.add_task(name, total=total, note="")
            yield lambda done, note="": progress.update(task, completed=done, note=note)
        self.seconds[name] = time.perf_counter() - began
        log.info("%s took %.1f s", name, self.seconds[name])
        if self.worker and self.console.is_terminal:
            self.console.print(f"{self.worker}: {name}, {in_words(self.seconds[name])}", highlight=False)


def worker_name() -> str:
    """The job's number, where this process is one of several that a sweep has started; else nothing."""
    if multiprocessing.parent_process() is None or not HydraConfig.initialized():
        return ""
    job = HydraConfig.get().job
    return "" if OmegaConf.is_missing(job, "num") else f"job {job.num}"

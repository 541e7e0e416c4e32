"""What a person sees while a run works: a bar per stage, with what it is at and the time left."""

import logging
import multiprocessing
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext

from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf
from rich.console import Console
from rich.progress import BarColumn, Progress, Task, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from tfmq_exp.cli.terminal import say, visible
from tfmq_exp.core.formatting import format_duration

log = logging.getLogger(__name__)

Advance = Callable[[float, str], None]


class ProgressBars:
    """Progress bars on a terminal; elsewhere a line every half minute and one in the log when a stage ends.

    Jobs that share a terminal would paint over each other's bars: they write lines, with their number in front.

    Args:
        console: where they are shown.
        every: seconds between two lines.
    """

    def __init__(self, console: Console, every: float = 30.0) -> None:
        self.console, self.every, self.worker = console, every, worker_name()
        self.seconds: dict[str, float] = {}

    @contextmanager
    def stage(self, name: str, total: float) -> Iterator[Advance]:
        """A bar that counts to `total`. Call the result with how far the work is and what it is at."""
        columns = (
            TextColumn("{task.description:<14}", markup=False),
            BarColumn(bar_width=min(28, self.console.width // 3)),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}", style="dim", markup=False),
        )
        moving = self.console.is_interactive and not self.worker
        began = time.perf_counter()
        with Progress(*columns, console=self.console, disable=not moving, speed_estimate_period=600) as progress:
            task = progress.add_task(name, total=total, note="")
            with nullcontext() if moving else repeated(self.every, lambda: self.say(line(progress.tasks[0]))):
                yield lambda done, note="": progress.update(task, completed=done, note=visible(note))
        self.seconds[name] = time.perf_counter() - began
        log.info("%s took %.1f s", name, self.seconds[name])
        if self.worker and self.console.is_interactive:
            self.say(f"{name}, {format_duration(self.seconds[name])}")

    def say(self, text: str) -> None:
        """A line, of a job among others with its number."""
        say(self.console, f"{self.worker}: {text}" if self.worker else text)


def line(task: Task) -> str:
    """A stage, its share that is done, what it is at, and the time left where that is known."""
    words = [task.description, f"{task.percentage:.0f}%", task.fields["note"]]
    left = "" if task.time_remaining is None else f"{format_duration(task.time_remaining)} left"
    return ", ".join(word for word in (*words, left) if word)


@contextmanager
def repeated(every: float, act: Callable[[], None]) -> Iterator[None]:
    """Do something every so many seconds, in a thread, until the block ends."""
    over = threading.Event()

    def keep_on() -> None:
        while not over.wait(every):
            act()

    thread = threading.Thread(target=keep_on, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def worker_name() -> str:
    """The job's number, where this process is one of several that a sweep has started; else nothing."""
    if multiprocessing.parent_process() is None or not HydraConfig.initialized():
        return ""
    job = HydraConfig.get().job
    return "" if OmegaConf.is_missing(job, "num") else f"job {job.num}"

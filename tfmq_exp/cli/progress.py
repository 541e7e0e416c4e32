"""Progress bars: one per stage, with a note and the time left."""

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext

from rich.console import Console
from rich.progress import BarColumn, Progress, Task, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from tfmq_exp.cli.terminal import say, visible
from tfmq_exp.core.formatting import format_duration
from tfmq_exp.pipeline.pipeline import Advance

log = logging.getLogger(__name__)


class ProgressBars:
    """Progress bars on a terminal; elsewhere a line every half minute and one in the log when a stage ends.

    Args:
        console: where they are shown.
        worker: name of this job among others that share the terminal: they write lines that begin with it, since bars would
            paint over each other; empty for a job of its own.
        every: seconds between two lines.
    """

    def __init__(self, console: Console, worker: str = "", every: float = 30.0) -> None:
        self.console, self.worker, self.every = console, worker, every

    @contextmanager
    def stage(self, name: str, total: float) -> Iterator[Advance]:
        """A bar that counts to `total`; the result takes the amount that is done and a note."""
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
        seconds = time.perf_counter() - began
        log.info("%s took %.1f s", name, seconds)
        if self.worker and self.console.is_interactive:
            self.say(f"{name}, {format_duration(seconds)}")

    def say(self, text: str) -> None:
        """Print a line, with the worker's name in front."""
        say(self.console, f"{self.worker}: {text}" if self.worker else text)


def line(task: Task) -> str:
    """Name of a stage, share that is done, note, and the time left where it is known."""
    words = [task.description, f"{task.percentage:.0f}%", task.fields["note"]]
    left = "" if task.time_remaining is None else f"{format_duration(task.time_remaining)} left"
    return ", ".join(word for word in (*words, left) if word)


@contextmanager
def repeated(every: float, act: Callable[[], None]) -> Iterator[None]:
    """Call a function every so many seconds, in a thread, until the block ends."""
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

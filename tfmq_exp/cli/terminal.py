"""Output to a terminal of any width and encoding, a file, or a pipe whose reader has left; progress bars of stages."""

import io
import logging
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from rich.console import Console
from rich.text import Text

from tfmq_exp.core.formatting import format_duration

# C0 and C1 codes but tabulator and line feed, separators of lines, signs that turn the direction of writing, surrogates.
CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
DEFAULT_WIDTH = 80
log = logging.getLogger(__name__)


def visible(text: str) -> str:
    r"""The text with control characters written as their codes, `\x1b` for escape, which a terminal does not obey."""
    return CONTROL.sub(lambda found: ascii(found[0])[1:-1], text)


class Terminal(Console):
    """A console that shows names as they are: nothing in them is markup, an emoji or a control sequence.

    Bars move on a real terminal alone, whatever the environment says of colours. When the reader of the output leaves, as
    `head` does, the work goes on silently; where the output cannot be written, as on a full disk, stderr says so once.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"markup": False, "emoji": False, "highlight": False, **options})
        self.is_interactive = self.is_interactive and self.file.isatty()
        self.width = self.width or DEFAULT_WIDTH  # COLUMNS=0 comes from terminals that do not know theirs

    def print(self, *objects: Any, **options: Any) -> None:
        """Print, unless the stream cannot be written."""
        try:
            super().print(*objects, **options)
        except OSError as error:
            self.on_broken_pipe()
            say_unwritten(error, "; the work goes on, and the run folder has its results")

    def render_str(self, text: str, **options: Any) -> Text:
        """Text with visible control characters."""
        return super().render_str(visible(text), **options)

    def on_broken_pipe(self) -> None:
        """Print nothing any more."""
        self.quiet = True
        discard(self.file)


def say(console: Console, text: str) -> None:
    """Print one line, however long, as it is."""
    console.print(Text(visible(text)), soft_wrap=True)


def say_error(console: Console, text: str) -> None:
    """Print one line that begins with `error:`, however long."""
    console.print(Text.assemble(("error:", "bold red"), f" {visible(text)}"), soft_wrap=True)


class VisibleFormatter(logging.Formatter):
    """Lines of a log with visible control characters."""

    def format(self, record: logging.LogRecord) -> str:
        return visible(super().format(record))


def open_streams() -> None:
    """Have standard streams that are open and take any text, with question marks for what their encoding lacks.

    A closed stream leaves its number to the next file that is opened, into which libraries would then print.
    """
    logging.raiseExceptions = False  # a log that cannot be written needs no traceback for every line
    while (number := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(number, True)
    os.close(number)
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


@contextmanager
def standard_streams() -> Iterator[None]:
    """Around a whole program: it may print any text, and its reader may leave.

    Raises:
        SystemExit: with SIGPIPE's status when its reader left; with status 1 where stdout cannot be written.
    """
    open_streams()
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        raise SystemExit(128 + signal.SIGPIPE) from None
    except OSError as error:
        try:
            sys.stdout.write("\n")
            sys.stdout.flush()
        except OSError:
            discard(sys.stdout)
            say_unwritten(error)
            raise SystemExit(1) from None
        raise  # it was about another file
    finally:
        for stream in (sys.stdout, sys.stderr):
            try:
                stream.flush()
            except OSError:
                discard(stream)


def say_unwritten(error: OSError, further: str = "") -> None:
    """Write one line to stderr, if that can be written."""
    with suppress(OSError, ValueError):
        sys.stderr.write(f"error: what is printed cannot be written: {error.strerror}{further}\n")
        sys.stderr.flush()


def discard(stream: Any) -> None:
    """Send what a stream still holds, and all that follows, to /dev/null."""
    with suppress(OSError, ValueError):  # it may be no file of the system's
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)


class ProgressBars:
    """Progress bars on a terminal; elsewhere a line every half minute (`every`) and one in the log when a stage ends.

    Jobs that share the terminal have a name, `worker`, and write lines that begin with it: bars would paint over each other.
    """

    def __init__(self, console: Console, worker: str = "", every: float = 30.0) -> None:
        self.console, self.worker, self.every = console, worker, every

    @contextmanager
    def stage(self, name: str, total: float) -> Iterator[Callable[[float, str], None]]:
        """A bar that counts to `total`; the result takes the amount that is done and a note."""
        # here, so that --help answers at once
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

        columns = (
            TextColumn("{task.description:<14}", markup=False),
            BarColumn(bar_width=min(28, self.console.width // 3)),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}", style="dim", markup=False),
        )
        moving, over = self.console.is_interactive and not self.worker, threading.Event()
        began = time.perf_counter()
        with Progress(*columns, console=self.console, disable=not moving, speed_estimate_period=600) as progress:
            task = progress.add_task(name, total=total, note="")

            def say_lines() -> None:
                while not over.wait(self.every):
                    self.say(line(progress.tasks[0]))

            if moving:
                over.set()
            (speaker := threading.Thread(target=say_lines, daemon=True)).start()
            try:
                yield lambda done, note="": progress.update(task, completed=done, note=visible(note))
            finally:
                over.set()
                speaker.join()
        seconds = time.perf_counter() - began
        log.info("%s took %.1f s", name, seconds)
        if self.worker and self.console.is_interactive:
            self.say(f"{name}, {format_duration(seconds)}")

    def say(self, text: str) -> None:
        """Print a line, with the worker's name in front."""
        say(self.console, f"{self.worker}: {text}" if self.worker else text)


def line(task: Any) -> str:
    """Name of a stage, share that is done, note, and the time left where it is known."""
    words = [task.description, f"{task.percentage:.0f}%", task.fields["note"]]
    left = "" if task.time_remaining is None else f"{format_duration(task.time_remaining)} left"
    return ", ".join(word for word in (*words, left) if word)

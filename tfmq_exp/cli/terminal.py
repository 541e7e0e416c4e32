"""Output of the program to a terminal of any width and encoding, a file, or a pipe whose reader has left."""

import io
import logging
import os
import re
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from rich.console import Console
from rich.text import Text

# C0 and C1 codes but tabulator and line feed, separators of lines, signs that turn the direction of writing, surrogates.
CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
DEFAULT_WIDTH = 80


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
        """One record as text."""
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
        SystemExit: with the status of a program that SIGPIPE ended, when its reader left; with status 1 where stdout cannot be
            written.
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

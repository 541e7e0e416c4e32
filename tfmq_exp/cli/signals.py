"""Ctrl-C and SIGTERM while several jobs are at work: the first ends them in order, the second at once."""

import multiprocessing
import os
import signal
import sys
from collections.abc import Callable
from types import FrameType, TracebackType

from tfmq_exp.cli.job import stop


def interruptible(farewell: Callable[[], None]) -> Callable[[], None]:
    """Handle both signals in this process from now on, where nobody else does; the result makes it as it was.

    Args:
        farewell: what is still to be said when the second Ctrl-C ends the program.
    """
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM), sys.excepthook

    def undo() -> None:
        signal.signal(signal.SIGINT, before[0])
        signal.signal(signal.SIGTERM, before[1])
        sys.excepthook = before[2]

    def again(number: int, _: FrameType | None) -> None:
        farewell()
        for child in multiprocessing.active_children():
            child.kill()
        sys.stdout.flush()
        os._exit(128 + number)  # whoever waits for a worker would wait on

    def first(_number: int, _: FrameType | None) -> None:
        signal.signal(signal.SIGINT, again)
        raise KeyboardInterrupt

    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, first)
    if signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
        signal.signal(signal.SIGTERM, stop)
    sys.excepthook = quietly(sys.excepthook)
    return undo


Hook = Callable[[type[BaseException], BaseException, TracebackType | None], object]


def quietly(shown: Hook) -> Hook:
    """The same hook, silent about Ctrl-C: who typed it knows, and where it met the program is of no use."""

    def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if not issubclass(kind, KeyboardInterrupt):
            shown(kind, error, trace)

    return hook

"""Ctrl-C and SIGTERM while several jobs are at work: the first ends them in order, the second at once."""

import multiprocessing
import os
import signal
import sys
from collections.abc import Callable
from types import FrameType, TracebackType

from tfmq_exp.cli.job import stop


def interruptible(on_abort: Callable[[], object]) -> Callable[[], None]:
    """Handle both signals in this process, unless they are handled already; the result restores what was there before.

    Args:
        on_abort: called when the second Ctrl-C ends the program; prints the last message.
    """
    on_interrupt, on_terminate = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    excepthook = sys.excepthook

    def restore() -> None:
        signal.signal(signal.SIGINT, on_interrupt)
        signal.signal(signal.SIGTERM, on_terminate)
        sys.excepthook = excepthook

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

    if on_interrupt is signal.default_int_handler:
        signal.signal(signal.SIGINT, first)
    if on_terminate is signal.SIG_DFL:
        signal.signal(signal.SIGTERM, stop)
    sys.excepthook = hook
    return restore

"""The end of a job: its state in the run folder, and an error as one line."""

import gc
import logging
import re
import shutil
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig
from rich.console import Console

from tfmq_exp.cli.status import State, Status, begun, occupied
from tfmq_exp.cli.terminal import Terminal, open_streams, say, say_error
from tfmq_exp.cli.validation import check
from tfmq_exp.core.validate import WrongValueError

Work = Callable[[DictConfig, Path, Console], tuple[State, str]]
# All that a run folder holds after a dry run.
PLANNED = {".hydra", ".running.lock", "run.log", "status.json", "estimate.json"}


class Stopped(SystemExit):
    """SIGTERM: somebody wants the program to end."""


def attempt(cfg: DictConfig, work: Work) -> None:
    """Do a job's work; an error is one line on the terminal, its traceback is in the run's log.

    Inside a sweep a job that fails says so in its status alone, and the others go on. A dry run that is the only job
    leaves no folder.

    Args:
        cfg: the job.
        work: given the job, its folder and a terminal; returns in which state it ends, and why.

    Raises:
        SystemExit: with status 1, when the job failed and was the only one; with 128 and the signal's number, when
            SIGTERM or Ctrl-C ended it.
    """
    open_streams()  # launchers start jobs in processes of their own
    logging.raiseExceptions = False  # a full disk is said once, not with a traceback for every line of the log
    hydra, console = HydraConfig.get(), Terminal()
    folder = Path(hydra.runtime.output_dir)
    sweeping = hydra.mode == RunMode.MULTIRUN
    status = begun(folder.name, hydra.job.num if sweeping else None)
    try:
        with occupied(folder), stoppable():
            status.write(folder)
            try:
                check(cfg)
                status = status.turned(*work(cfg, folder, console))
            except Exception as error:
                status = status.turned("failed", one_line(root_cause(error)))
                raise
            except BaseException as stop:  # a signal: the job may be started again in this folder
                status = status.turned("interrupted", f"stopped by {what_stopped(stop)}")
                raise
            finally:
                note_end(status, folder)
    except Exception as error:
        say_error(console, one_line(root_cause(error)))
        logging.getLogger("tfmq_exp.traceback").debug("the job failed", exc_info=error)
        if cfg.runtime.traceback:
            raise
        say(console, f"its traceback is in {folder}/run.log")
        if not sweeping:
            raise SystemExit(1) from None
    except BaseException as stop:
        if not sweeping:
            say(console, f"{status.reason}; the same command goes on from there. Run folder: {folder}")
        if (number := signal_behind(stop)) is not None:
            raise SystemExit(128 + number) from None
        raise
    finally:
        gc.collect()  # trainers and their modules refer to each other, and with them to large tensors; sweeps go on
    if status.state == "planned" and not sweeping:
        discard_plan(folder)


def note_end(status: Status, folder: Path) -> None:
    """Write how a job ended; what hinders that is a warning, and shall not stand for what the job met."""
    try:
        status.write(folder)
    except OSError as error:
        logging.getLogger(__name__).warning("how the job ended is not noted: %s", error)


@contextmanager
def stoppable() -> Iterator[None]:
    """SIGTERM, which would end the process without a word, raises `Stopped`; a handler that is there already stays."""
    own = threading.current_thread() is threading.main_thread()
    if not own or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return
    signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def stop(number: int, _: FrameType | None) -> None:
    """Handle a signal.

    Raises:
        Stopped: always.
    """
    raise Stopped(128 + number)


def signal_behind(error: BaseException | None) -> signal.Signals | None:
    """The signal that an exception stands for: libraries wrap them in exceptions of their own, or end the program."""
    while error is not None:
        if isinstance(error, KeyboardInterrupt):
            return signal.SIGINT
        if isinstance(error, Stopped) or type(error).__name__ == "SIGTERMException":  # Lightning's
            return signal.SIGTERM
        error = error.__cause__ or error.__context__
    return None


def what_stopped(error: BaseException) -> str:
    """The signal in words; the name of the exception where none is behind it."""
    number = signal_behind(error)
    return "Ctrl-C (SIGINT)" if number == signal.SIGINT else number.name if number else type(error).__name__


def discard_plan(folder: Path) -> None:
    """Remove the run folder of a dry run; one that was there before, with results, stays."""
    if folder.is_dir() and {path.name for path in folder.iterdir()} <= PLANNED:
        shutil.rmtree(folder)


def root_cause(error: BaseException) -> BaseException:
    """Hydra wraps what a constructor raises; the user wants the reason, and of a wrong value its key, which Hydra knows."""
    key = None
    while type(error).__module__.startswith("hydra.") and error.__cause__ is not None:
        key = re.search(r"full_key: (\S+)", str(error))
        error = error.__cause__
    return ValueError(error.under(key[1])) if key and isinstance(error, WrongValueError) else error


def one_line(error: BaseException) -> str:
    """What an error says, with its type where that is no message to a user."""
    text = " ".join(str(error).split())
    expected = isinstance(error, ValueError | OSError | RuntimeError | TypeError | KeyError)
    return text if expected and text else f"{type(error).__name__}: {text}"

"""One job of `run.py`: run, or found where an identical job was done before; its status and exit code.

Light to import (no torch), so that mistakes are reported at once.
"""

import gc
import logging
import re
import shutil
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from omegaconf import DictConfig
from rich.console import Console

from tfmq_exp.cli.finished_jobs import claim, job_identity, keep, take
from tfmq_exp.cli.outputs.score_table import print_scores
from tfmq_exp.cli.run_info import current_run
from tfmq_exp.cli.status import State, Status, begun, occupied
from tfmq_exp.cli.terminal import Terminal, open_streams, say, say_error
from tfmq_exp.cli.validation import check
from tfmq_exp.core.files import read_record
from tfmq_exp.core.validate import WrongValueError
from tfmq_exp.pipeline.store import Store
from tfmq_exp.report.records import ScoreRecord

Work = Callable[[DictConfig, Path, Console], tuple[State, str]]
PLANNED = {".hydra", ".running.lock", "run.log", "status.json", "estimate.json"}  # files of a dry run's folder
log = logging.getLogger(__name__)


class Stopped(SystemExit):
    """SIGTERM."""


def perform(cfg: DictConfig) -> None:
    """Run one job, or find its results; raises as `attempt`."""
    attempt(cfg, find_or_run)


def find_or_run(cfg: DictConfig, folder: Path, console: Console) -> tuple[State, str]:
    """Take the results of an identical job that is done, unless `force`; else run this one."""
    if cfg.dry_run:
        return run(cfg, folder, console)
    claim(folder, cfg)
    store = Store(Path(cfg.paths.store))
    record = store.entry("jobs", job_identity(cfg, current_run().overrides))
    if cfg.force or (origin := take(store, record, folder)) is None:
        ended = run(cfg, folder, console)
        keep(store, record, folder)
        return ended
    if (results := folder / "results.json").is_file():
        print_scores([ScoreRecord(**row) for row in read_record(results)["rows"]], console)
    say(console, f"finished before in {origin}; force=true does it again")
    say(console, f"run folder: {folder}")
    return "found", str(origin)


def run(cfg: DictConfig, folder: Path, console: Console) -> tuple[State, str]:
    """Do the work; imports torch and all that takes seconds to import."""
    if console.is_interactive and "torch" not in sys.modules:
        console.print("loading ...", style="dim")
    from tfmq_exp.cli.main import work

    return work(cfg, folder, console)


def attempt(cfg: DictConfig, work: Work) -> None:
    """Do a job's work; an error is one line on the terminal, its traceback is in the run's log.

    A job of a sweep that fails only records that in its status, and the others go on. A single dry run leaves no folder.
    `work` takes the job, its folder and a terminal; it returns in which state the job ends, and why.

    Raises:
        SystemExit: with status 1, when the job failed and was the only one; with 128 and the signal's number, when
            SIGTERM or Ctrl-C ended it.
    """
    open_streams()  # launchers start jobs in processes of their own
    info, console = current_run(), Terminal()
    folder, status = info.folder, begun(info.name, info.job_number if info.sweep else None)
    try:
        with occupied(folder), stoppable():
            status.write(folder)
            try:
                check(cfg, info)
                status = status.turned(*work(cfg, folder, console))
            except Exception as error:
                status = status.turned("failed", one_line(error))
                raise
            except BaseException as stop:  # a signal: the job may be started again in this folder
                status = status.turned("interrupted", f"stopped by {what_stopped(stop)}")
                raise
            finally:
                write_last(status, folder)
    except Exception as error:
        say_error(console, one_line(error))
        logging.getLogger("tfmq_exp.traceback").debug("the job failed", exc_info=error)
        if cfg.runtime.traceback:
            raise
        say(console, f"its traceback is in {folder}/run.log")
        if not info.sweep:
            raise SystemExit(1) from None
    except BaseException as stop:
        if not info.sweep:
            say(console, f"{status.reason}; the same command goes on from there. Run folder: {folder}")
        if (number := signal_behind(stop)) is not None:
            raise SystemExit(128 + number) from None
        raise
    finally:
        gc.collect()  # trainers and their modules refer to each other, and with them to large tensors; sweeps go on
    if status.state == "planned" and not info.sweep:
        discard_plan(folder)


def write_last(status: Status, folder: Path) -> None:
    """Write how a job ended; an error of that is a warning, and must not hide the job's own."""
    try:
        status.write(folder)
    except OSError as error:
        log.warning("how the job ended is not noted: %s", error)


@contextmanager
def stoppable() -> Iterator[None]:
    """Let SIGTERM raise `Stopped`, unless it has a handler already."""
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGTERM) != signal.SIG_DFL:
        yield
        return
    signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def stop(number: int, _: FrameType | None) -> None:
    """Handle a signal: raise `Stopped`."""
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
    """Name of the signal behind an exception, or of the exception where there is none."""
    number = signal_behind(error)
    return "Ctrl-C (SIGINT)" if number == signal.SIGINT else number.name if number else type(error).__name__


def discard_plan(folder: Path) -> None:
    """Remove the run folder of a dry run; one that was there before, with results, stays."""
    if folder.is_dir() and {path.name for path in folder.iterdir()} <= PLANNED:
        shutil.rmtree(folder)


def root_cause(error: BaseException) -> BaseException:
    """The error that a constructor raised, which Hydra wraps; a wrong value gets the key that Hydra knows."""
    key = None
    while type(error).__module__.startswith("hydra.") and error.__cause__ is not None:
        key = re.search(r"full_key: (\S+)", str(error))
        error = error.__cause__
    return ValueError(error.under(key[1])) if key and isinstance(error, WrongValueError) else error


def one_line(error: BaseException) -> str:
    """Message of an error's root cause, with its type where the message alone is not meant for users."""
    text = " ".join(str(error := root_cause(error)).split())
    expected = isinstance(error, ValueError | OSError | RuntimeError | TypeError | KeyError)
    return text if expected and text else f"{type(error).__name__}: {text}"

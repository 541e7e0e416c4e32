"""Multi-process launcher: the main process of a run starts the others on this machine."""

import logging
import multiprocessing
import os
import signal
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from pathlib import Path

from omegaconf import DictConfig

from tfmq_exp.cli.job import one_line, root_cause
from tfmq_exp.cli.run_info import hydra_state, restore_hydra_state
from tfmq_exp.core.distributed import ALONE, ProcessGroup, init_process_group
from tfmq_exp.core.files import write_atomically

Share = Callable[[DictConfig, ProcessGroup, Path], None]
EXIT_TIMEOUT = 10.0  # seconds that a process has to end, or to say why it ended


@contextmanager
def together(cfg: DictConfig, share: Share) -> Iterator[ProcessGroup]:
    """The main process of `runtime.processes`; the others run `share` meanwhile: the same stages in the same order.

    Args:
        cfg: the job.
        share: a function of a module, called with the job, the process, and a folder for files that are not kept.

    Raises:
        ValueError: fewer than one process.
        RuntimeError: another process failed; says which, and why.
    """
    count = cfg.runtime.processes
    if count < 1:
        raise ValueError(f"runtime.processes must be at least 1, got {count}")
    if count == 1:
        yield ALONE
        return
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory(prefix="tfmq-processes-") as name:
        folder = Path(name)
        given = [(share, cfg, hydra_state(), rank, count, folder) for rank in range(1, count)]
        others = [context.Process(target=join, args=args, daemon=True) for args in given]
        for process in others:
            process.start()
        try:
            with init_process_group(0, count, folder / "meeting"):
                yield ProcessGroup(0, count)
            for process in others:
                process.join(EXIT_TIMEOUT)
        except Exception as error:
            if (reason := why_one_failed(others, folder)) is None:
                raise
            raise RuntimeError(reason) from error
        finally:
            for process in others:
                process.kill()
                process.join()


def join(share: Share, cfg: DictConfig, hydra: DictConfig, rank: int, count: int, folder: Path) -> None:
    """Run another process from its start to its end.

    Args:
        share: the work, see `together`.
        cfg: the job.
        hydra: the main process's state of Hydra, as `hydra_state` returns it.
        rank: of this process, 1 to count - 1.
        count: number of processes.
        folder: common to all: their meeting point, temporary files, and the error of a process that failed.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the main process ends it
    threading.Thread(target=end_with_main_process, daemon=True).start()
    logging.getLogger(__name__.partition(".")[0]).setLevel(logging.ERROR)  # the main process warns of the same
    restore_hydra_state(hydra)
    try:
        with init_process_group(rank, count, folder / "meeting") as processes:
            scratch = folder / f"scratch-{rank}"
            scratch.mkdir()
            share(cfg, processes, scratch)
    except Exception as error:
        reason = one_line(root_cause(error)).encode(errors="backslashreplace")
        write_atomically(folder / f"failed-{rank}", lambda path: path.write_bytes(reason))
        raise SystemExit(1) from error


def end_with_main_process() -> None:
    """End this process as soon as the main one is gone: killed, it cannot end the others, which would wait for it."""
    if (main := multiprocessing.parent_process()) is not None:
        main.join()
        os._exit(1)


def why_one_failed(others: Sequence[BaseProcess], folder: Path) -> str | None:
    """Rank and error of the first process that failed; None if none did. A lost connection to another one is no error."""
    for rank, process in enumerate(others, start=1):
        process.join(EXIT_TIMEOUT / len(others))
        report = folder / f"failed-{rank}"
        if process.exitcode is not None and process.exitcode < 0:
            return f"process {rank} of {len(others) + 1} was ended by {signal.Signals(-process.exitcode).name}"
        if report.is_file():
            return f"process {rank} of {len(others) + 1}: {report.read_text(encoding='utf-8')}"
    return None

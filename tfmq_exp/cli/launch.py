"""A run of several processes on one machine: the one that was started is the first, and starts the others."""

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

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from tfmq_exp.cli.outcome import one_line, root_cause
from tfmq_exp.core.distributed import ALONE, ProcessGroup, joined
from tfmq_exp.core.files import write_atomically

Share = Callable[[DictConfig, ProcessGroup, Path], None]
FAREWELL = 10.0  # seconds that a process has to end, or to say why it ended


@contextmanager
def together(cfg: DictConfig, share: Share) -> Iterator[ProcessGroup]:
    """The first of `runtime.processes`; the others run `share` meanwhile, which pulls the same stages in the same order.

    Args:
        cfg: the job.
        share: a function of a module, given the job, the process, and a folder for what only the first one's is kept of.

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
        settings = cfg, HydraConfig.get()
        others = [
            context.Process(target=join, args=(share, *settings, rank, count, folder), daemon=True)
            for rank in range(1, count)
        ]
        for process in others:
            process.start()
        try:
            with joined(0, count, folder / "meeting"):
                yield ProcessGroup(0, count)
            for process in others:
                process.join(FAREWELL)
        except Exception as error:
            reason = why_one_failed(others, folder)
            if reason is None:
                raise
            raise RuntimeError(reason) from error
        finally:
            for process in others:
                process.kill()
                process.join()


def join(share: Share, cfg: DictConfig, hydra: DictConfig, rank: int, count: int, folder: Path) -> None:
    """What another process does from its start to its end."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the first one ends it
    threading.Thread(target=end_with_the_first, daemon=True).start()
    logging.getLogger(__name__.partition(".")[0]).setLevel(logging.ERROR)  # the first one warns of the same
    HydraConfig.instance().set_config(OmegaConf.create({"hydra": hydra}))
    try:
        with joined(rank, count, folder / "meeting") as processes:
            scratch = folder / f"scratch-{rank}"
            scratch.mkdir()
            share(cfg, processes, scratch)
    except Exception as error:
        reason = one_line(root_cause(error))
        write_atomically(
            folder / f"failed-{rank}", lambda path: path.write_text(reason, encoding="utf-8", errors="backslashreplace")
        )
        raise SystemExit(1) from error


def end_with_the_first() -> None:
    """End this process as soon as the first one is gone: killed, it cannot end the others, which would wait for it."""
    first = multiprocessing.parent_process()
    if first is not None:
        first.join()
        os._exit(1)


def why_one_failed(others: Sequence[BaseProcess], folder: Path) -> str | None:
    """Which process failed first and why, None if none did; one that lost its connection to another is no reason."""
    for rank, process in enumerate(others, start=1):
        process.join(FAREWELL / len(others))
        told = folder / f"failed-{rank}"
        if process.exitcode is not None and process.exitcode < 0:
            return f"process {rank} of {len(others) + 1} was ended by {signal.Signals(-process.exitcode).name}"
        if told.is_file():
            return f"process {rank} of {len(others) + 1}: {told.read_text(encoding='utf-8')}"
    return None

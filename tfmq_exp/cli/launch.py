"""Multi-process launcher: the main process of a run starts the others on this machine."""

import logging
import multiprocessing
import os
import signal
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from omegaconf import DictConfig
from torch.multiprocessing import ProcessExitedException, ProcessRaisedException, start_processes

from tfmq_exp.cli.job import one_line
from tfmq_exp.cli.run_info import hydra_state, restore_hydra_state
from tfmq_exp.core.distributed import ALONE, ProcessGroup, init_process_group

Share = Callable[[DictConfig, ProcessGroup, Path], None]
EXIT_TIMEOUT = 10.0  # seconds that the processes have to end, or to say why one ended


@contextmanager
def together(cfg: DictConfig, share: Share) -> Iterator[ProcessGroup]:
    """The main process of `runtime.processes`; the others run `share` meanwhile: the same stages in the same order.

    `share` is a function of a module, called with the job, the process, and a folder for files that are not kept.

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
    with tempfile.TemporaryDirectory(prefix="tfmq-processes-") as name:
        given = (share, cfg, hydra_state(), Path(name))
        others: Any = start_processes(_join, given, count - 1, join=False, daemon=True, start_method="spawn")
        try:
            with init_process_group(0, count, Path(name) / "meeting"):
                yield ProcessGroup(0, count)
            others.join(EXIT_TIMEOUT)
        except Exception as error:
            try:
                others.join(EXIT_TIMEOUT)
            except ProcessExitedException as end:
                rank = f"process {end.error_index + 1} of {count}"
                raise RuntimeError(f"{rank} was ended by {end.signal_name or f'exit code {end.exit_code}'}") from error
            except ProcessRaisedException as end:  # with a traceback, whose last line is ours
                reason = end.msg.rstrip().splitlines()[-1].removeprefix("RuntimeError: ")
                raise RuntimeError(f"process {end.error_index + 1} of {count}: {reason}") from error
            raise
        finally:
            for process in others.processes:
                process.kill()
                process.join()


def _join(index: int, share: Share, cfg: DictConfig, hydra: DictConfig, folder: Path) -> None:
    """Run one of the other processes from its start to its end; its error is a line."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the main process ends it
    threading.Thread(target=end_with_main_process, daemon=True).start()
    logging.getLogger(__name__.partition(".")[0]).setLevel(logging.ERROR)  # the main process warns of the same
    restore_hydra_state(hydra)
    scratch = folder / f"scratch-{index}"
    scratch.mkdir()
    try:
        with init_process_group(index + 1, cfg.runtime.processes, folder / "meeting") as processes:
            share(cfg, processes, scratch)
    except Exception as error:
        raise RuntimeError(one_line(error)) from error


def end_with_main_process() -> None:
    """End this process as soon as the main one is gone: killed, it cannot end the others, which would wait for it."""
    if (main := multiprocessing.parent_process()) is not None:
        main.join()
        os._exit(1)

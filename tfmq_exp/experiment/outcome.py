"""The end of a job: its state in the run folder, and an error as one line."""

import gc
import logging
from collections.abc import Callable
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig
from rich.console import Console

from tfmq_exp.experiment.status import State, begun, occupied

Work = Callable[[DictConfig, Path, Console], tuple[State, str]]


def attempt(cfg: DictConfig, work: Work) -> None:
    """Do a job's work; an error is one line on the terminal, its traceback is in the run's log.

    Inside a sweep a job that fails says so in its status alone, and the others go on.

    Args:
        cfg: the job.
        work: given the job, its folder and a terminal; returns in which state it ends, and why.

    Raises:
        SystemExit: with status 1, when the job failed and was the only one.
    """
    hydra, console = HydraConfig.get(), Console()
    folder = Path(hydra.runtime.output_dir)
    sweeping = hydra.mode == RunMode.MULTIRUN
    status = begun(folder.name, hydra.job.num if sweeping else None)
    try:
        with occupied(folder):
            status.write(folder)
            try:
                status = status.turned(*work(cfg, folder, console))
            except Exception as error:
                status = status.turned("failed", one_line(root_cause(error)))
                raise
            except BaseException as stop:  # a signal: the job may be started again in this folder
                status = status.turned("interrupted", f"stopped by {type(stop).__name__}")
                raise
            finally:
                status.write(folder)
    except Exception as error:
        console.print(f"[bold red]error:[/] {one_line(root_cause(error))}", highlight=False, soft_wrap=True)
        logging.getLogger("tfmq_exp.traceback").debug("the job failed", exc_info=error)
        if cfg.runtime.traceback:
            raise
        if not sweeping:
            raise SystemExit(1) from None
    finally:
        gc.collect()  # trainers and their modules refer to each other, and with them to large tensors; sweeps go on


def root_cause(error: BaseException) -> BaseException:
    """Hydra wraps what a constructor raises; the user wants the reason."""
    while type(error).__module__.startswith("hydra.") and error.__cause__ is not None:
        error = error.__cause__
    return error


def one_line(error: BaseException) -> str:
    """What an error says, with its type where that is no message to a user."""
    text = " ".join(str(error).split())
    expected = isinstance(error, ValueError | OSError | RuntimeError | TypeError | KeyError)
    return text if expected and text else f"{type(error).__name__}: {text}"

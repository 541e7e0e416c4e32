"""One job of `run.py`: found where it was done before, done otherwise. Light to import, so that mistakes are told at once."""

import sys
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf
from rich.console import Console

from tfmq_exp.cli.outcome import attempt
from tfmq_exp.cli.score_table import show
from tfmq_exp.cli.status import State
from tfmq_exp.cli.terminal import say
from tfmq_exp.core.files import read_record, write_atomically
from tfmq_exp.report.records import ScoreRecord


def perform(cfg: DictConfig) -> None:
    """Run one job, or find it.

    Raises:
        SystemExit: with status 1, when the job failed and was the only one.
    """
    attempt(cfg, find_or_run)


def find_or_run(cfg: DictConfig, folder: Path, console: Console) -> tuple[State, str]:
    """Results in the folder, whoever made them; `repeat` looks for nobody."""
    if console.is_interactive and "torch" not in sys.modules:
        console.print("loading ...", style="dim")
    from tfmq_exp.cli.job_cache import STAGE, clear, keep, take  # with the store comes torch
    from tfmq_exp.cli.job_identity import job_identity
    from tfmq_exp.pipeline.store import Store

    if cfg.dry_run:
        return run(cfg, folder, console)
    settings = OmegaConf.to_yaml(cfg, resolve=True)
    clear(folder, settings)
    store = Store(Path(cfg.paths.store))
    record = store.entry(STAGE, job_identity(cfg, HydraConfig.get().overrides.task))
    origin = None if cfg.repeat else take(store, record, folder)
    if origin is None:
        ended = run(cfg, folder, console)
        keep(store, record, folder)
        return ended
    write_atomically(
        folder / "config.yaml", lambda path: path.write_text(settings, encoding="utf-8", errors="backslashreplace")
    )
    results = folder / "results.json"
    if results.is_file():
        show([ScoreRecord(**row) for row in read_record(results)["rows"]], console)
    say(console, f"finished before in {origin}; repeat=true does it again")
    say(console, f"run folder: {folder}")
    return "found", str(origin)


def run(cfg: DictConfig, folder: Path, console: Console) -> tuple[State, str]:
    """The work itself, and with it torch and all that it takes seconds to import."""
    from tfmq_exp.cli.main import work

    return work(cfg, folder, console)

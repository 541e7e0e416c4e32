"""Profile of a job by Python's own profiler."""

import cProfile
import importlib
import pstats
from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig


class Profile(Callback):
    """Hydra callback around every job: `profile.txt` in the run folder with so many functions, `profile.pstats` for viewers."""

    def __init__(self, functions: int = 60) -> None:
        self.functions = functions

    def on_job_start(self, config: DictConfig, **_: Any) -> None:
        """Start after the imports, which take seconds and are the same for every job."""
        importlib.import_module("tfmq_exp.cli.main")
        self.profiler = cProfile.Profile()
        self.profiler.enable()

    def on_job_end(self, config: DictConfig, **_: Any) -> None:
        self.profiler.disable()
        folder = Path(config.hydra.runtime.output_dir)
        self.profiler.dump_stats(folder / "profile.pstats")
        with (folder / "profile.txt").open("w", encoding="utf-8") as file:
            for order in ("cumulative", "tottime"):
                pstats.Stats(self.profiler, stream=file).sort_stats(order).print_stats(self.functions)

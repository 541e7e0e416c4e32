"""Profile of a job by Python's own profiler."""

import cProfile
import importlib
import pstats
from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig


class Profile(Callback):
    """Hydra callback around every job: `profile.txt` in the run folder, and `profile.pstats` for viewers.

    Args:
        functions: number of functions that are listed, the most expensive first.
    """

    def __init__(self, functions: int = 60) -> None:
        self.functions, self.profiler = functions, cProfile.Profile()

    def on_job_start(self, config: DictConfig, **_: Any) -> None:
        """Start after the imports, which take seconds and are the same for every job."""
        importlib.import_module("tfmq_exp.cli.main")
        self.profiler = cProfile.Profile()
        self.profiler.enable()

    def on_job_end(self, config: DictConfig, **_: Any) -> None:
        """Write both files."""
        self.profiler.disable()
        folder = Path(config.hydra.runtime.output_dir)
        self.profiler.dump_stats(folder / "profile.pstats")
        with (folder / "profile.txt").open("w", encoding="utf-8") as file:
            stats = pstats.Stats(self.profiler, stream=file)
            stats.sort_stats("cumulative").print_stats(self.functions)
            stats.sort_stats("tottime").print_stats(self.functions)

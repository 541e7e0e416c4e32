"""Where a job's time goes, by Python's own profiler."""

import cProfile
import importlib
import io
import pstats
from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig


class Profile(Callback):
    """Hydra calls it around every job: `profile.txt` in the run folder for people, `profile.pstats` for viewers.

    Args:
        functions: how many are listed, the dearest first.
    """

    def __init__(self, functions: int = 60) -> None:
        self.functions, self.profiler = functions, cProfile.Profile()

    def on_job_start(self, config: DictConfig, **_: Any) -> None:
        """Begin anew, with everything imported: that takes seconds, and is the same for every job."""
        importlib.import_module("tfmq_exp.cli.main")
        self.profiler = cProfile.Profile()
        self.profiler.enable()

    def on_job_end(self, config: DictConfig, **_: Any) -> None:
        """Write both files."""
        self.profiler.disable()
        folder, text = Path(config.hydra.runtime.output_dir), io.StringIO()
        self.profiler.dump_stats(folder / "profile.pstats")
        stats = pstats.Stats(self.profiler, stream=text)
        stats.sort_stats("cumulative").print_stats(self.functions)
        stats.sort_stats("tottime").print_stats(self.functions)
        (folder / "profile.txt").write_text(text.getvalue(), encoding="utf-8")

"""Calibration data: states of the float model's trajectories."""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from tfmq_exp.calibration.collect import collect_trajectories, join_by_step
from tfmq_exp.calibration.dataset import CalibrationSet
from tfmq_exp.core.files import intact, write_checked
from tfmq_exp.core.finite import within
from tfmq_exp.pipeline.pipeline import Stage

FILE = "calibration.safetensors"


class CollectTrajectory(Stage):
    """Every state of the float model's trajectories, in one pass."""

    stored_as = "trajectory"

    def inputs(self) -> Mapping[str, Any]:
        run = self.run
        inputs = {**run.model_inputs, "sampling": run.calibration_sampling}
        return {**inputs, "calibration": run.calibration, "seed": run.seed}

    def compute(self, folder: Path) -> None:
        run, group, calls = self.run, self.pipeline.group, len(self.run.calibration_calls)
        parts, batches = folder / "parts", run.calibration.batches()
        files = {indices: parts / f"{indices.start:06d}.safetensors" for indices in batches}
        parts.mkdir(exist_ok=True)
        share = group.shard(batches)
        with self.pipeline.progress(self.name, len(share) * calls) as advance:
            for i, indices in enumerate(share):
                if intact(files[indices]):
                    continue

                def each_step(step: int, done: int = i * calls + 1) -> None:
                    advance(done + step, f"step {step + 1}")

                with within("calibration trajectories of the float network"):
                    given = run.denoiser, run.calibration_sampling, indices
                    part = collect_trajectories(*given, seed=run.seed, each_step=each_step)
                write_checked(files[indices], part.save)
        group.barrier()
        if group.is_main:
            whole = join_by_step([CalibrationSet.load(file) for file in files.values()])
            write_checked(folder / FILE, whole.save)
            shutil.rmtree(parts)

    def samples(self) -> CalibrationSet:
        """The calibration set."""
        return CalibrationSet.load(self.result() / FILE)

    def samples_if_needed(self) -> CalibrationSet:
        """The calibration set, or an empty one for a method that learns and observes nothing on trajectories."""
        if self.run.follows_trajectories:
            return self.samples()
        none = torch.zeros(0, dtype=torch.long)
        return CalibrationSet(torch.zeros(0, *self.run.denoiser.sample_shape), none, none, none)

"""Data that a network is quantized with: trajectories of the float model, or training images."""

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tfmq_exp.calibration.dataset import CalibrationSet, collect_trajectories
from tfmq_exp.core.batches import batches
from tfmq_exp.core.files import write_checked
from tfmq_exp.core.finite import within
from tfmq_exp.pipeline.pipeline import Advance, Stage
from tfmq_exp.qat.dataset import TrainingSet, training_set_identity, write_training_set

FILE = "calibration.safetensors"


class CollectTrajectory(Stage):
    """Calibration data: every state of the float model's trajectories, in one pass."""

    stored_as = "trajectory"
    in_parts = True

    def inputs(self) -> Mapping[str, Any]:
        run = self.run
        data = {"sampling": run.calibration_sampling, "calibration": run.calibration, "seed": run.seed}
        return {**run.model_inputs, **data}

    def compute(self, folder: Path) -> None:
        run, calls, parts = self.run, len(self.run.calibration_calls), folder / "parts"

        def make(indices: range, advance: Advance) -> Callable[[Path], object]:
            def each_step(step: int) -> None:
                advance((step + 1) / calls, f"step {step + 1}")

            given = run.denoiser, run.calibration_sampling, indices
            with within("calibration trajectories of the float network"):
                return collect_trajectories(*given, seed=run.seed, each_step=each_step).save

        parts.mkdir(exist_ok=True)
        together = batches(run.calibration.images, run.calibration.batch)
        files = {indices: parts / f"{indices.start:06d}.safetensors" for indices in together}
        with self.pipeline.progress(self.name, 1) as advance:
            self.pipeline.compute_files(files, make, advance)
        if self.pipeline.group.is_main:
            whole = CalibrationSet.join([CalibrationSet.load(file) for file in files.values()], by_step=True)
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


@dataclass(eq=False)
class EncodeExamples(Stage):
    """x_0 of quantization-aware training, pixels or latents; `horizontal_flip` adds the mirror image of each."""

    horizontal_flip: bool
    stored_as = "examples"

    def inputs(self) -> Mapping[str, Any]:
        return training_set_identity(self.run.training_images, self.run.denoiser, horizontal_flip=self.horizontal_flip)

    def compute(self, folder: Path) -> None:
        if not self.pipeline.group.is_main:
            return
        with self.pipeline.progress(self.name, 1) as advance:
            write_training_set(
                *(self.run.training_images, self.run.denoiser, folder, self.run.compute.batch),
                horizontal_flip=self.horizontal_flip,
                progress=lambda done, total: advance(done / total, f"{done} of {total}"),
            )

    def examples(self) -> TrainingSet:
        """The training set, left on the disk."""
        return TrainingSet.load(self.result())

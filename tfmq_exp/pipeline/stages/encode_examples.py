"""Training images as the denoiser sees them: pixels, or latents of its first stage."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tfmq_exp.methods.qat_method import QuantizationAwareTrain
from tfmq_exp.pipeline.pipeline import Pipeline, Stage
from tfmq_exp.pipeline.run import Run
from tfmq_exp.qat import dataset
from tfmq_exp.qat.dataset import TrainingSet


class EncodeExamples(Stage):
    """x_0 of quantization-aware training."""

    name = stored_as = "examples"

    def __init__(self, run: Run, pipeline: Pipeline, training: QuantizationAwareTrain) -> None:
        super().__init__(run, pipeline)
        self.mirrored = training.protocol.mirrored

    @property
    def inputs(self) -> Mapping[str, Any]:
        return dataset.identity(self.run.training_images, self.run.denoiser, mirrored=self.mirrored)

    def compute(self, folder: Path) -> None:
        if not self.pipeline.group.is_main:
            return
        given = self.run.training_images, self.run.denoiser, folder, self.run.compute.batch
        with self.pipeline.progress.stage(self.name, 1) as advance:
            dataset.write(*given, mirrored=self.mirrored, told=lambda done, of: advance(done / of, f"{done} of {of}"))

    def examples(self) -> TrainingSet:
        """The training set, left on the disk."""
        return TrainingSet.load(self.result())

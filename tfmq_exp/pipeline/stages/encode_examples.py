"""Training images as the denoiser sees them: pixels, or latents of its first stage."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tfmq_exp.pipeline.pipeline import Stage
from tfmq_exp.qat import dataset
from tfmq_exp.qat.dataset import TrainingSet


@dataclass(eq=False)
class EncodeExamples(Stage):
    """x_0 of quantization-aware training; `mirrored` adds the mirror image of each."""

    mirrored: bool
    stored_as = "examples"

    def inputs(self) -> Mapping[str, Any]:
        return dataset.identity(self.run.training_images, self.run.denoiser, mirrored=self.mirrored)

    def compute(self, folder: Path) -> None:
        if not self.pipeline.group.is_main:
            return
        given = self.run.training_images, self.run.denoiser, folder, self.run.compute.batch
        with self.pipeline.progress(self.name, 1) as advance:
            dataset.write(*given, mirrored=self.mirrored, told=lambda done, of: advance(done / of, f"{done} of {of}"))

    def examples(self) -> TrainingSet:
        """The training set, left on the disk."""
        return TrainingSet.load(self.result())

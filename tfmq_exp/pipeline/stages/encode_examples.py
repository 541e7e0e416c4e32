"""Training images as the denoiser sees them: pixels, or latents of its first stage."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tfmq_exp.pipeline.pipeline import Stage
from tfmq_exp.qat.dataset import TrainingSet, training_set_identity, write_training_set


@dataclass(eq=False)
class EncodeExamples(Stage):
    """x_0 of quantization-aware training; `horizontal_flip` adds the mirror image of each."""

    horizontal_flip: bool
    stored_as = "examples"

    def inputs(self) -> Mapping[str, Any]:
        return training_set_identity(self.run.training_images, self.run.denoiser, horizontal_flip=self.horizontal_flip)

    def compute(self, folder: Path) -> None:
        if not self.pipeline.group.is_main:
            return
        given = self.run.training_images, self.run.denoiser, folder, self.run.compute.batch
        with self.pipeline.progress(self.name, 1) as advance:
            write_training_set(
                *given,
                horizontal_flip=self.horizontal_flip,
                progress=lambda done, total: advance(done / total, f"{done} of {total}"),
            )

    def examples(self) -> TrainingSet:
        """The training set, left on the disk."""
        return TrainingSet.load(self.result())

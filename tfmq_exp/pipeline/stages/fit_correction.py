"""Statistics of the quantization noise, by which PTQD corrects the prediction and the sampler."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from tfmq_exp.methods.noise_correction import NoiseCorrection, NoiseStatistics
from tfmq_exp.pipeline.pipeline import Pipeline, Stage
from tfmq_exp.pipeline.run import Run
from tfmq_exp.pipeline.stages.calibrate_activations import CalibrateActivations

FILE = "statistics.safetensors"


class FitCorrection(Stage):
    """Noise statistics of the quantized network on float trajectories."""

    name = stored_as = "correction"

    def __init__(
        self, run: Run, pipeline: Pipeline, correction: NoiseCorrection, activations: CalibrateActivations
    ) -> None:
        super().__init__(run, pipeline)
        self.correction, self.activations = correction, activations

    @property
    def inputs(self) -> Mapping[str, Any]:
        network = {"activations": self.activations.key, "correction": self.correction, "seed": self.run.seed}
        return {**self.run.model_inputs, **network}

    def compute(self, folder: Path) -> None:
        run, batch, model = self.run, self.run.compute.batch, self.activations.model
        passes = -(-self.correction.images // batch) * len(run.calls)
        with self.pipeline.progress.stage(self.name, passes) as advance:
            statistics = self.correction.measure(
                *(model, run.denoiser, run.sampling),
                seed=run.seed,
                batch=batch,
                each_step=lambda done: advance(done, ""),
            )
        self.pipeline.store.write(folder / FILE, lambda path: save_file(statistics.tensors(), path))

    def statistics(self) -> NoiseStatistics:
        """Statistics of every sampling step."""
        return NoiseStatistics.of(load_file(self.result() / FILE))

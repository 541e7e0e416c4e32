"""Statistics of the quantization noise, by which PTQD corrects the prediction and the sampler."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from tfmq_exp.methods.noise_correction import NoiseCorrection, NoiseStatistics
from tfmq_exp.pipeline.pipeline import Stage
from tfmq_exp.pipeline.stages.calibrate_activations import CalibrateActivations

FILE = "statistics.safetensors"


@dataclass(eq=False)
class FitCorrection(Stage):
    """Noise statistics of the quantized network on float trajectories."""

    correction: NoiseCorrection
    activations: CalibrateActivations
    stored_as = "correction"

    def inputs(self) -> Mapping[str, Any]:
        network = {"activations": self.activations.key, "correction": self.correction, "seed": self.run.seed}
        return {**self.run.model_inputs, **network}

    def compute(self, folder: Path) -> None:
        run, batch = self.run, self.run.compute.batch
        given, passes = (self.activations.model, run.denoiser, run.sampling), -(-self.correction.images // batch)
        with self.pipeline.progress(self.name, passes * len(run.calls)) as advance:
            found = self.correction.measure(*given, seed=run.seed, batch=batch, each_step=lambda i: advance(i, ""))
        self.pipeline.store.write(folder / FILE, lambda path: save_file(found.tensors(), path))

    def statistics(self) -> NoiseStatistics:
        """Statistics of every sampling step."""
        return NoiseStatistics.of(load_file(self.result() / FILE))

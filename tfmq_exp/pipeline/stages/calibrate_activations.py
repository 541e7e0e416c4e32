"""Activation ranges, and with them the finished quantized network as an artefact."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from tfmq_exp.core.files import write_checked
from tfmq_exp.core.seeds import Stream, derive_seed
from tfmq_exp.pipeline.learning import learning
from tfmq_exp.pipeline.pipeline import Stage
from tfmq_exp.pipeline.stages.collect_trajectory import CollectTrajectory
from tfmq_exp.pipeline.stages.reconstruct_weights import ReconstructWeights
from tfmq_exp.pipeline.stages.train_weights import TrainWeights
from tfmq_exp.reconstruction.context import ReconstructionContext
from tfmq_exp.sampling.recipe import Recipe
from tfmq_exp.surgery import serialization
from tfmq_exp.surgery.quantized_unet import QuantizedUNet

FILE = "quantized.safetensors"


@dataclass(eq=False)
class CalibrateActivations(Stage):
    """The finished quantized network: integer weights, activation scales, temporal features."""

    trajectory: CollectTrajectory
    weights: ReconstructWeights | TrainWeights
    stored_as = "activations"

    def inputs(self) -> Mapping[str, Any]:
        method, data = self.run.method, {"trajectory": self.trajectory.key, "seed": self.run.seed}
        phases = {"weights": self.weights.key, "activations": method.activations, "temporal": method.temporal}
        return {**data, **self.run.layer_inputs, **phases}

    def compute(self, folder: Path) -> None:
        run, model, data = self.run, self.weights.model(), self.trajectory.samples_if_needed()
        network, seed = (model, run.denoiser.unet, run.structure), derive_seed(run.seed, Stream.ACTIVATIONS)
        with learning(self.pipeline, self.name, folder) as callbacks:
            run.method.activations(ReconstructionContext(*network, data, run.compute, seed, *callbacks))
        run.method.temporal(*network)
        model.tabulate_scales()
        if self.pipeline.group.is_main:
            recipe = Recipe.of(run.calibration_sampling, run.denoiser)
            write_checked(folder / FILE, lambda path: serialization.save(model, path, recipe))

    def count(self) -> int:
        return len(list(self.entry.path.glob("units/*.safetensors")))

    @cached_property
    def model(self) -> QuantizedUNet:
        """The network, loaded from its artefact."""
        return serialization.load(self.result() / FILE).to(self.run.denoiser.device)

    @property
    def artefact(self) -> Path:
        """File of the quantized network."""
        return self.entry.path / FILE

"""Activation ranges, which finish the quantized network, and the correction of its noise."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from tfmq_exp.core.seeds import Stream, derive_seed
from tfmq_exp.methods.noise_correction import NoiseCorrection, NoiseStatistics
from tfmq_exp.pipeline.pipeline import Stage
from tfmq_exp.pipeline.stages.data import CollectTrajectory
from tfmq_exp.pipeline.stages.weights import ReconstructWeights, TrainWeights
from tfmq_exp.pipeline.unit_checkpoints import finished_units, learning
from tfmq_exp.reconstruction.context import ReconstructionContext
from tfmq_exp.sampling.guidance import Sampling
from tfmq_exp.sampling.recipe import Recipe
from tfmq_exp.sampling.trajectory import Predict
from tfmq_exp.surgery import serialization
from tfmq_exp.surgery.quantized_network import QuantizedNetwork

ARTEFACT, STATISTICS = "quantized.safetensors", "statistics.safetensors"
log = logging.getLogger(__name__)


@dataclass(eq=False)
class CalibrateActivations(Stage):
    """The quantized network as an artefact: integer weights, activation scales, temporal features."""

    trajectory: CollectTrajectory
    weights: ReconstructWeights | TrainWeights
    stored_as = "activations"

    def inputs(self) -> Mapping[str, Any]:
        method, data = self.run.method, {"trajectory": self.trajectory.key, "seed": self.run.seed}
        phases = {"weights": self.weights.key, "activations": method.activations, "temporal": method.temporal}
        if method.temporal.stores:  # by condition
            phases["choices"] = self.run.sampled_choices
        return {**data, **self.run.layer_inputs, **phases}

    def compute(self, folder: Path) -> None:
        run, model, data = self.run, self.weights.model(), self.trajectory.samples_if_needed()
        network, seed = (model, run.denoiser.network, run.structure), derive_seed(run.seed, Stream.ACTIVATIONS)
        with learning(self.pipeline, self.name, folder) as callbacks:
            run.method.activations(ReconstructionContext(*network, data, run.compute, seed, *callbacks))
        run.method.temporal(*network, run.feature_inputs)
        model.tabulate_scales()
        recipe = Recipe.of(run.calibration_sampling, run.denoiser)
        self.pipeline.store.write(folder / ARTEFACT, lambda path: serialization.save(model, path, recipe))

    def count(self) -> int:
        return finished_units(self.entry.path)

    @cached_property
    def model(self) -> QuantizedNetwork:
        """The network, loaded from its artefact."""
        return serialization.load(self.result() / ARTEFACT).to(self.run.denoiser.device)

    @property
    def artefact(self) -> Path:
        """File of the quantized network."""
        return self.entry.path / ARTEFACT


@dataclass(eq=False)
class FitCorrection(Stage):
    """Noise statistics of the quantized network on float trajectories, by which PTQD corrects prediction and sampler."""

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
        self.pipeline.store.write(folder / STATISTICS, partial(save_file, found.tensors()))

    @cached_property
    def statistics(self) -> NoiseStatistics:
        """Statistics of every sampling step."""
        return NoiseStatistics.of(load_file(self.result() / STATISTICS))


@dataclass(eq=False)
class QuantizationResult:
    """The finished quantized network, with the correction of its noise if the method has one."""

    sampling: Sampling
    activations: CalibrateActivations
    correction: FitCorrection | None

    @property
    def stage(self) -> Stage:
        """The last stage that makes it."""
        return self.correction or self.activations

    @property
    def statistics(self) -> NoiseStatistics | None:
        """Noise statistics, for methods that correct it."""
        return self.correction.statistics if self.correction else None

    @cached_property
    def model(self) -> QuantizedNetwork:
        """The network with the activation bits of every step chosen."""
        model, statistics = self.activations.model, self.statistics
        if statistics is not None and statistics.bits:
            model.use_bits(statistics.bits)
        elif widths := model.activation_bits():
            log.warning("nothing chooses between %s activation bits: %d at every step", widths, widths[-1])
        return model

    def sampler(self) -> tuple[Predict, Sampling]:
        """Prediction and sampling, both corrected."""
        return self.corrected(self.sampling.predictor(self.model.for_timesteps(self.activations.run.calls)))

    def corrected(self, predict: Predict) -> tuple[Predict, Sampling]:
        """A prediction of this network, and the sampling, both corrected by the noise statistics."""
        if self.correction is None:
            return predict, self.sampling
        return self.correction.correction(predict, self.sampling, self.correction.statistics)

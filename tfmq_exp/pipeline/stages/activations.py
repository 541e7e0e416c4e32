"""Activation ranges, which finish the quantized network, and the correction of its noise."""

import logging
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from tfmq_exp.core.seeds import Stream, derive_seed
from tfmq_exp.core.tensor_file import TensorFile
from tfmq_exp.denoisers.loading.loading_modules import Read, called_within, loading_modules
from tfmq_exp.denoisers.loading.meta_network import move_loaded
from tfmq_exp.methods.noise_correction import NoiseCorrection
from tfmq_exp.methods.noise_statistics import NoiseStatistics
from tfmq_exp.pipeline.pipeline import Stage
from tfmq_exp.pipeline.stages.data import CollectTrajectory
from tfmq_exp.pipeline.stages.weights import (
    RECONSTRUCTED,
    ReconstructWeights,
    TrainWeights,
    freeze_outline,
    stored_weights,
)
from tfmq_exp.pipeline.unit_checkpoints import finished_units, learning
from tfmq_exp.reconstruction.context import ReconstructionContext
from tfmq_exp.sampling.guidance import Sampling
from tfmq_exp.sampling.recipe import Recipe
from tfmq_exp.sampling.trajectory import Predict
from tfmq_exp.surgery import serialization
from tfmq_exp.surgery.model_in_parts import load_in_parts, parameters_of
from tfmq_exp.surgery.quantized_network import QuantizedNetwork

ARTEFACT, STATISTICS = "quantized.safetensors", "statistics.safetensors"
log = logging.getLogger(__name__)


@dataclass(eq=False)
class CalibrateActivations(Stage):
    """The quantized network as an artefact: integer weights, activation scales, temporal features."""

    trajectory: CollectTrajectory
    weights: ReconstructWeights | TrainWeights
    stored_as = "activations"
    in_parts = True

    def inputs(self) -> Mapping[str, Any]:
        method, data = self.run.method, {"trajectory": self.trajectory.key, "seed": self.run.seed}
        phases = {"weights": self.weights.key, "activations": method.activations, "temporal": method.temporal}
        if method.temporal.stores:  # by condition
            phases["choices"] = self.run.sampled_choices
        return {**data, **self.run.layer_inputs, **phases}

    def compute(self, folder: Path) -> None:
        run, model, data = self.run, self.weights.model(), self.trajectory.samples_if_needed()
        network, seed = (model, run.denoiser.network, run.structure), derive_seed(run.seed, Stream.ACTIVATIONS)
        stored = stored_weights(run, self.weights.entry.path)
        with learning(self.pipeline, self.name, folder) as callbacks:
            run.method.activations(ReconstructionContext(*network, data, run.compute, seed, *callbacks, stored))
        recipe, missing = Recipe.of(run.calibration_sampling, run.denoiser), self.missing_tensors()
        with run.denoiser.loading(), ExitStack() as loading:
            if stored and missing:
                freeze_outline(model, stored.integers)
                read = parameters_of(model, missing)
                loading.enter_context(loading_modules(model.network, read, run.denoiser.device))
            # conditions of all images are encoded only where their features are stored
            run.method.temporal(*network, run.feature_inputs if run.method.temporal.stores else None)
        model.tabulate_scales()
        self.pipeline.store.write(folder / ARTEFACT, lambda path: serialization.save(model, path, recipe, missing))

    def missing_tensors(self) -> Callable[[str], Tensor] | None:
        """Tensors that are not in memory by their names in the artefact; None where all are."""
        if (shards := self.run.denoiser.shards) is None:
            return None
        codes = TensorFile(self.weights.entry.path / RECONSTRUCTED)
        return lambda key: (
            codes[key] if key in codes else shards.read([name := key.removeprefix("float/")])[name].float()
        )

    def count(self) -> int:
        return finished_units(self.entry.path)

    @cached_property
    def model(self) -> QuantizedNetwork:
        """The network, loaded from its artefact; to be run inside of `loading` where its weights are not in memory."""
        if self.run.denoiser.shards:
            return self._in_parts[0]
        return serialization.load(self.result() / ARTEFACT).to(self.run.denoiser.device)

    @cached_property
    def _in_parts(self) -> tuple[QuantizedNetwork, Read]:
        model, read = load_in_parts(self.result() / ARTEFACT)
        move_loaded(model, self.run.denoiser.device)
        return model, read

    def loading(self) -> AbstractContextManager[None]:
        """Inside, the network can be run, wherever its weights are."""
        if self.run.denoiser.shards is None:
            return nullcontext()
        return loading_modules(self.model.network, self._in_parts[1], self.run.denoiser.device)

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
    in_parts = True

    def inputs(self) -> Mapping[str, Any]:
        network = {"activations": self.activations.key, "correction": self.correction, "seed": self.run.seed}
        return {**self.run.model_inputs, **network}

    def compute(self, folder: Path) -> None:
        run, batch = self.run, self.run.compute.batch
        given, passes = (self.activations.model, run.denoiser, run.sampling), -(-self.correction.images // batch)
        loading = run.denoiser.loading(), self.activations.loading()
        with self.pipeline.progress(self.name, passes * len(run.calls)) as advance, loading[0], loading[1]:
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
        call = called_within(self.model.for_timesteps(self.activations.run.calls), self.activations.loading)
        return self.corrected(self.sampling.predictor(call))

    def corrected(self, predict: Predict) -> tuple[Predict, Sampling]:
        """A prediction of this network, and the sampling, both corrected by the noise statistics."""
        if self.correction is None:
            return predict, self.sampling
        schedule = self.activations.run.denoiser.schedule
        return self.correction.correction(predict, self.sampling, self.correction.statistics, schedule)

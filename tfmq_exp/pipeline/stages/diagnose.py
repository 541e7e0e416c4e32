"""Diagnoses of a finished quantized network, a stage each; the result is a table."""

import json
from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from tfmq_exp.core.files import write_json
from tfmq_exp.core.seeds import Stream
from tfmq_exp.diagnostics.activation_ranges import activation_ranges
from tfmq_exp.diagnostics.attention_maps import AttentionMaps, Places
from tfmq_exp.diagnostics.block_similarity import MINIBATCH, BlockSimilarity
from tfmq_exp.diagnostics.rounding_changes import rounding_changes
from tfmq_exp.diagnostics.rows import Row
from tfmq_exp.diagnostics.sensitivity import PredictionProbe, QuantizedUnit, quantized_units, spread_over_steps
from tfmq_exp.diagnostics.temporal_error import feature_errors
from tfmq_exp.diagnostics.trajectory_error import TrajectoryPair
from tfmq_exp.diagnostics.word_tokens import word_tokens
from tfmq_exp.pipeline.pipeline import Advance, Stage
from tfmq_exp.pipeline.stages.activations import QuantizationResult
from tfmq_exp.pipeline.stages.data import CollectTrajectory
from tfmq_exp.quant.timestep_context import Timestep
from tfmq_exp.reconstruction.units import TemporalAware

PASSES = 4  # of a step: float and quantized network on both trajectories; or one with all activations recorded


@dataclass(eq=False)
class Diagnosis(Stage):
    """A table about the quantized network, stored as JSON."""

    quantized: QuantizationResult
    trajectory: CollectTrajectory

    @property
    def name(self) -> str:
        return self.stored_as.removeprefix("diagnosis_")

    def inputs(self) -> Mapping[str, Any]:
        return {"network": self.quantized.stage.key}

    @abstractmethod
    def measure(self, folder: Path, advance: Advance) -> list[Row]:
        """The rows; `advance` counts to 1."""

    def compute(self, folder: Path) -> None:
        with self.pipeline.progress(self.name, 1) as advance:
            rows = self.measure(folder, advance)
        self.pipeline.store.write_json(folder / "rows.json", rows)

    def rows(self) -> list[Row]:
        """The table."""
        return self.read_json("rows.json")


class WeightRounding(Diagnosis):
    """Integer weights against the nearest ones."""

    stored_as = "diagnosis_rounding"

    def measure(self, folder: Path, advance: Advance) -> list[Row]:
        return rounding_changes(self.quantized.model, self.run.denoiser.network, self.run.structure)


class TemporalFeatures(Diagnosis):
    """Errors of temporal features, layer by layer, at the timesteps that are sampled."""

    stored_as = "diagnosis_features"

    def inputs(self) -> Mapping[str, Any]:
        return {**super().inputs(), "timesteps": self.timesteps}

    @property
    def timesteps(self) -> tuple[Timestep, ...]:
        return self.run.sampling.finite_set(self.run.denoiser)

    def measure(self, folder: Path, advance: Advance) -> list[Row]:
        run = self.run
        networks = self.quantized.model, run.denoiser.network, run.structure
        return feature_errors(*networks, self.timesteps, run.temporal_conditions)


class ErrorAccumulation(Diagnosis):
    """Errors of single steps, and what accumulates from them."""

    stored_as = "diagnosis_accumulation"

    def inputs(self) -> Mapping[str, Any]:
        followed = {"trajectories": self.run.diagnosis.trajectories, "seed": self.run.seed}
        return {**self.run.model_inputs, **super().inputs(), **followed}

    def count(self) -> int:
        return PASSES * self.run.diagnosis.trajectories * len(self.run.calls)

    def measure(self, folder: Path, advance: Advance) -> list[Row]:
        run, images, batch = self.run, self.run.diagnosis.trajectories, self.run.compute.batch
        passes = len(run.calls) * -(-images // batch)
        pair = TrajectoryPair(*self.quantized.sampler(), run.denoiser, run.sampling, run.seed)
        return pair.accumulation(images, batch, lambda done: advance(done / passes, ""))


class ActivationRanges(ErrorAccumulation):
    """Activations of the float model at every network call, and the quantizers' ranges; on the same trajectories."""

    stored_as = "diagnosis_ranges"

    def measure(self, folder: Path, advance: Advance) -> list[Row]:
        run, calls = self.run, len(self.run.calls)
        given = self.quantized.model, run.denoiser, run.structure, run.sampling
        options = {"images": run.diagnosis.trajectories, "seed": run.seed, "batch": run.compute.batch}
        return activation_ranges(*given, **options, each_call=lambda done: advance(done / calls, f"call {done}"))


class FeatureSimilarity(ErrorAccumulation):
    """Similarity of every block's features in the two networks, and the attention that chosen words get; on the same trajectories."""

    stored_as = "diagnosis_similarity"

    def inputs(self) -> Mapping[str, Any]:
        words = {word: {str(image): own for image, own in places.items()} for word, places in self.places.items()}
        return {**super().inputs(), **({"words": words} if words else {})}

    def count(self) -> int:
        return super().count() * 2 // PASSES  # the float and the quantized network, once each

    @cached_property
    def captions(self) -> list[str]:
        """Captions of the trajectories; empty where no words are asked for."""
        run = self.run
        images = range(run.diagnosis.trajectories if run.diagnosis.words else 0)
        return [str(one) for one in run.sampling.conditioning.choose(run.seed, Stream.DIAGNOSTICS, images)]

    def check_words(self) -> None:
        """Raise ValueError, before anything is computed, for words that attention cannot be shown of; see `word_tokens`."""
        _ = self.places

    @cached_property
    def places(self) -> Places:
        """See `word_tokens`."""
        return word_tokens(self.run.denoiser.encoder, self.captions, self.run.diagnosis.words)

    def measure(self, folder: Path, advance: Advance) -> list[Row]:
        run, images, calls = self.run, self.run.diagnosis.trajectories, len(self.run.calls)
        maps = AttentionMaps(self.places, run.denoiser.sample_shape, calls)
        given = self.quantized.model, run.denoiser, run.structure, run.sampling, run.seed
        passes = calls * -(-images // MINIBATCH)
        rows = BlockSimilarity(*given).measure(images, run.compute.batch, maps, lambda done: advance(done / passes, ""))
        self.pipeline.store.write_json(folder / "attention.json", maps.rows())
        tensors = {name: value.float().contiguous() for name, value in maps.shown().items()}
        self.pipeline.store.write(folder / "attention.safetensors", partial(save_file, tensors))
        return rows

    def attention(self) -> tuple[list[Row], dict[str, Tensor]]:
        """Comparison of the maps, and those that are shown, [networks, thirds, height, width], by word."""
        return self.read_json("attention.json"), load_file(self.result() / "attention.safetensors")


class UnitSensitivity(Diagnosis):
    """Error of the prediction that each unit makes. A measured unit is a file, from which an interrupted run goes on.

    `share` is of the whole quantized network's error: what the unit alone makes, or what leaving it float removes.
    """

    stored_as = "diagnosis_sensitivity"

    def inputs(self) -> Mapping[str, Any]:
        plan, data = self.run.diagnosis, {"trajectory": self.trajectory.key, "seed": self.run.seed}
        return {**super().inputs(), **data, "samples": plan.samples, "sensitivity": plan.sensitivity}

    def count(self) -> int:
        units = len(TemporalAware()(self.run.structure, frozenset(self.run.resolved.layers)))
        left = units + 2 - len(list((self.entry.path / "units").glob("*.json")))  # and both whole networks
        return left * -(-self.run.diagnosis.samples // (2 if self.run.sampling.guided else 1))

    def measure(self, folder: Path, advance: Advance) -> list[Row]:
        run, structure, alone = self.run, self.run.structure, self.run.diagnosis.sensitivity == "alone"
        network = self.quantized.model, run.denoiser.network
        data = spread_over_steps(self.trajectory.samples(), run.diagnosis.samples, run.seed)
        batch, units = min(run.compute.batch, len(data)), quantized_units(*network, structure)
        probe = PredictionProbe(*network, units, data, steps=len(run.calibration_calls), batch=batch)
        whole = probe.error()["relative_error"]

        def make(unit: QuantizedUnit, advance: Advance) -> Callable[[Path], object]:
            error = probe.unit_error(unit, alone=alone, each_batch=lambda done: advance(done, unit.name))
            return partial(write_json, data=error)

        (folder / "units").mkdir(exist_ok=True)
        files = {unit: folder / "units" / f"{unit.name}.json" for unit in units}
        self.pipeline.compute_files(files, make, advance)
        rows: list[Row] = []
        for unit, file in files.items():
            error = json.loads(file.read_text(encoding="utf-8"))
            ratio = error["relative_error"] / whole if whole else 0.0
            weights = sum(structure.layers[layer].weights for layer in unit.layers)
            named = {"unit": unit.name, "kind": unit.kind.value, "layers": len(unit.layers), "weights": weights}
            rows.append({**named, **error, "share": ratio if alone else 1 - ratio})
        return rows

    def rows(self) -> list[Row]:
        self.pipeline.require(self.trajectory)
        return super().rows()

"""Diagnoses of a finished quantized network, a stage each; the result is a table."""

import json
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from tfmq_exp.core.files import intact, write_checked, write_json
from tfmq_exp.diagnostics.activation_ranges import activation_ranges
from tfmq_exp.diagnostics.partial_quantization import quantized_units
from tfmq_exp.diagnostics.rounding_changes import rounding_changes
from tfmq_exp.diagnostics.sensitivity import PredictionProbe, spread_over_steps
from tfmq_exp.diagnostics.temporal_error import feature_errors
from tfmq_exp.diagnostics.trajectory_error import error_accumulation
from tfmq_exp.pipeline.networks import QuantizedNetwork
from tfmq_exp.pipeline.pipeline import Advance, Stage
from tfmq_exp.pipeline.stages.collect_trajectory import CollectTrajectory
from tfmq_exp.reconstruction.units import TemporalAware

Row = dict[str, Any]
PASSES = 4  # of a step: float and quantized network on both trajectories; or one with all activations recorded


@dataclass(eq=False)
class Diagnosis(Stage):
    """A table about the quantized network, stored as JSON."""

    network: QuantizedNetwork

    @property
    def name(self) -> str:
        return self.stored_as.removeprefix("diagnosis_")

    def inputs(self) -> Mapping[str, Any]:
        return {"network": self.network.stage.key}

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

    def inputs(self) -> Mapping[str, Any]:
        return {"network": self.network.activations.key}

    def measure(self, folder: Path, advance: Advance) -> list[Row]:
        return rounding_changes(self.network.model, self.run.denoiser.unet, self.run.structure)


class TemporalFeatures(Diagnosis):
    """Errors of temporal features, layer by layer and step by step."""

    stored_as = "diagnosis_features"

    def measure(self, folder: Path, advance: Advance) -> list[Row]:
        return feature_errors(self.network.model, self.run.denoiser.unet, self.run.structure)


class ErrorAccumulation(Diagnosis):
    """Errors of single steps, and what accumulates from them."""

    stored_as = "diagnosis_accumulation"

    def inputs(self) -> Mapping[str, Any]:
        followed = {"trajectories": self.run.diagnosis.trajectories, "seed": self.run.seed}
        return {**self.run.model_inputs, **super().inputs(), **followed}

    def options(self) -> dict[str, int]:
        """Trajectories that are followed."""
        run = self.run
        return {"images": run.diagnosis.trajectories, "seed": run.seed, "batch": run.compute.batch}

    def count(self) -> int:
        return PASSES * self.run.diagnosis.trajectories * len(self.run.calls)

    def measure(self, folder: Path, advance: Advance) -> list[Row]:
        run, options = self.run, self.options()
        passes = len(run.calls) * -(-options["images"] // options["batch"])
        given = *self.network.sampler(), run.denoiser, run.sampling
        return error_accumulation(*given, **options, each_step=lambda done: advance(done / passes, ""))


class ActivationRanges(ErrorAccumulation):
    """Activations of the float model at every network call, and the quantizers' ranges; on the same trajectories."""

    stored_as = "diagnosis_ranges"

    def measure(self, folder: Path, advance: Advance) -> list[Row]:
        run, calls = self.run, len(self.run.calls)
        given = self.network.model, run.denoiser, run.structure, run.sampling
        return activation_ranges(*given, **self.options(), each_call=lambda done: advance(done / calls, f"call {done}"))


@dataclass(eq=False)
class UnitSensitivity(Diagnosis):
    """Error of the prediction that each unit makes. A measured unit is a file, from which an interrupted run goes on.

    `share` is of the whole quantized network's error: what the unit alone makes, or what leaving it float removes.
    """

    trajectory: CollectTrajectory
    stored_as = "diagnosis_sensitivity"

    def inputs(self) -> Mapping[str, Any]:
        plan, data = self.run.diagnosis, {"trajectory": self.trajectory.key, "seed": self.run.seed}
        return {**super().inputs(), **data, "samples": plan.samples, "sensitivity": plan.sensitivity}

    def count(self) -> int:
        units = len(TemporalAware()(self.run.structure, frozenset(self.run.resolved.sites)))
        left = units + 2 - len(list((self.entry.path / "units").glob("*.json")))  # and both whole networks
        return left * -(-self.run.diagnosis.samples // (2 if self.run.sampling.guided else 1))

    def measure(self, folder: Path, advance: Advance) -> list[Row]:
        run, model, group = self.run, self.network.model, self.pipeline.group
        unet, structure, alone = run.denoiser.unet, run.structure, run.diagnosis.sensitivity == "alone"
        units = quantized_units(model, unet, structure)
        data = spread_over_steps(self.trajectory.samples(), run.diagnosis.samples, run.seed)
        batch = min(run.compute.batch, len(data))
        probe = PredictionProbe(model, unet, units, data, steps=len(run.calibration_calls), batch=batch)
        whole = probe.error()["relative_error"]
        (folder / "units").mkdir(exist_ok=True)
        files = {unit.name: folder / "units" / f"{unit.name}.json" for unit in units}
        share = [unit for unit in group.shard(units) if not intact(files[unit.name])]
        for i, unit in enumerate(share):

            def each_batch(done: float, i: int = i, name: str = unit.name) -> None:
                advance((i + done) / len(share), name)

            error = probe.unit_error(unit, alone=alone, each_batch=each_batch)
            write_checked(files[unit.name], partial(write_json, data=error))
        group.barrier()
        rows: list[Row] = []
        for unit in units:
            error = json.loads(files[unit.name].read_text(encoding="utf-8"))
            ratio = error["relative_error"] / whole if whole else 0.0
            weights = sum(structure.sites[layer].weights for layer in unit.layers)
            named = {"unit": unit.name, "kind": unit.kind.value, "layers": len(unit.layers), "weights": weights}
            rows.append({**named, **error, "share": ratio if alone else 1 - ratio})
        return rows

    def rows(self) -> list[Row]:
        rows = super().rows()
        self.pipeline.require(self.trajectory)
        return rows

"""Diagnoses of a finished quantized network, a stage each; the result is a table."""

import json
from abc import abstractmethod
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from tfmq_exp.diagnostics.accumulation import error_accumulation
from tfmq_exp.diagnostics.partial_quantization import quantized_parts
from tfmq_exp.diagnostics.ranges import activation_ranges
from tfmq_exp.diagnostics.rounding import rounding_changes
from tfmq_exp.diagnostics.sensitivity import PredictionProbe, spread_over_steps, unit_error
from tfmq_exp.diagnostics.temporal_error import feature_errors
from tfmq_exp.files import intact, write_checked, write_json
from tfmq_exp.pipeline.networks import QuantizedNetwork
from tfmq_exp.pipeline.pipeline import Advance, Pipeline, Stage
from tfmq_exp.pipeline.run import Run
from tfmq_exp.pipeline.stages.collect_trajectory import CollectTrajectory
from tfmq_exp.reconstruction.units import TemporalAware

Row = dict[str, Any]
WATCHED_PASS = 4  # cost of a pass in which all activations are recorded, over one of the quantized network


class Diagnosis(Stage):
    """A diagnosis whose rows are stored as JSON."""

    def __init__(self, run: Run, pipeline: Pipeline, network: QuantizedNetwork) -> None:
        super().__init__(run, pipeline)
        self.network, self.stored_as = network, f"diagnosis_{self.name}"

    @abstractmethod
    def measure(self, folder: Path, advance: Advance) -> list[Row]:
        """The rows; `advance` counts to 1."""

    def passes(self) -> int:
        """Passes of one image through the quantized network that are still to be made."""
        return 0

    def compute(self, folder: Path) -> None:
        with self.pipeline.progress.stage(self.name, 1) as advance:
            rows = self.measure(folder, advance)
        self.pipeline.store.write_json(folder / "rows.json", rows)

    def rows(self) -> list[Row]:
        """The table."""
        return json.loads((self.result() / "rows.json").read_text(encoding="utf-8"))


class WeightRounding(Diagnosis):
    """Integer weights against the nearest ones."""

    name = "rounding"

    @property
    def inputs(self) -> Mapping[str, Any]:
        return {"network": self.network.activations.key}

    def measure(self, folder: Path, advance: Advance) -> list[Row]:
        return rounding_changes(self.network.model, self.run.denoiser.unet, self.run.structure)


class TemporalFeatures(Diagnosis):
    """Errors of temporal features, layer by layer and step by step."""

    name = "features"

    @property
    def inputs(self) -> Mapping[str, Any]:
        return self.network.inputs

    def measure(self, folder: Path, advance: Advance) -> list[Row]:
        return feature_errors(self.network.model, self.run.denoiser.unet, self.run.structure)


class ErrorAccumulation(Diagnosis):
    """Errors of single steps, and what accumulates from them."""

    name = "accumulation"

    @property
    def inputs(self) -> Mapping[str, Any]:
        run = self.run
        return {**run.model_inputs, **self.network.inputs, "trajectories": self.followed, "seed": run.seed}

    @property
    def followed(self) -> int:
        """Number of trajectories."""
        return self.run.diagnosis.trajectories

    def passes(self) -> int:
        return 4 * self.followed * len(self.run.calls)  # float and quantized network on both trajectories

    def measure(self, folder: Path, advance: Advance) -> list[Row]:
        run, batch = self.run, self.run.compute.batch
        passes = len(run.calls) * -(-self.followed // batch)
        return error_accumulation(
            *(*self.network.sampler(), run.denoiser, run.sampling),
            images=self.followed,
            seed=run.seed,
            batch=batch,
            each_step=lambda done: advance(done / passes, ""),
        )


class ActivationRanges(ErrorAccumulation):
    """Activations of the float model at every network call, and the quantizers' ranges; on the same trajectories."""

    name = "ranges"

    def passes(self) -> int:
        return WATCHED_PASS * self.followed * len(self.run.calls)

    def measure(self, folder: Path, advance: Advance) -> list[Row]:
        run, calls = self.run, len(self.run.calls)
        return activation_ranges(
            *(self.network.model, run.denoiser, run.structure, run.sampling),
            images=self.followed,
            seed=run.seed,
            batch=run.compute.batch,
            each_call=lambda done: advance(done / calls, f"call {done}"),
        )


class UnitSensitivity(Diagnosis):
    """Error of the prediction that each unit makes. A measured unit is a file, from which an interrupted run goes on.

    `share` is of the whole quantized network's error: what the unit alone makes, or what leaving it float removes.
    """

    name = "sensitivity"

    def __init__(self, run: Run, pipeline: Pipeline, network: QuantizedNetwork, trajectory: CollectTrajectory) -> None:
        super().__init__(run, pipeline, network)
        self.trajectory = trajectory

    @property
    def inputs(self) -> Mapping[str, Any]:
        plan, data = self.run.diagnosis, {"trajectory": self.trajectory.key, "seed": self.run.seed}
        return {**self.network.inputs, **data, "samples": plan.samples, "sensitivity": plan.sensitivity}

    def passes(self) -> int:
        units = len(TemporalAware()(self.run.structure, frozenset(self.run.resolved.sites)))
        left = units + 2 - len(list((self.entry.path / "units").glob("*.json")))  # and both whole networks
        return left * -(-self.run.diagnosis.samples // (2 if self.run.sampling.guided else 1))

    def measure(self, folder: Path, advance: Advance) -> list[Row]:
        run, model, group = self.run, self.network.model, self.pipeline.group
        unet, structure, alone = run.denoiser.unet, run.structure, run.diagnosis.sensitivity == "alone"
        parts = quantized_parts(model, unet, structure)
        data = spread_over_steps(self.trajectory.samples(), run.diagnosis.samples, run.seed)
        batch = min(run.compute.batch, len(data))
        probe = PredictionProbe.of(model, unet, parts, data, steps=len(run.calls), batch=batch)
        whole = probe.error(model)["relative_error"]
        (folder / "units").mkdir(exist_ok=True)
        files = {part.name: folder / "units" / f"{part.name}.json" for part in parts}
        share = [part for part in group.shard(parts) if not intact(files[part.name])]
        for i, part in enumerate(share):

            def each_batch(done: float, i: int = i, name: str = part.name) -> None:
                advance((i + done) / len(share), name)

            error = unit_error(model, unet, part, parts, probe, alone=alone, each_batch=each_batch)
            write_checked(files[part.name], partial(write_json, data=error))
        group.barrier()
        rows: list[Row] = []
        for part in parts:
            error = json.loads(files[part.name].read_text(encoding="utf-8"))
            ratio = error["relative_error"] / whole if whole else 0.0
            weights = sum(structure.sites[layer].weights for layer in part.sites)
            named = {"unit": part.name, "kind": part.kind.value, "layers": len(part.sites), "weights": weights}
            rows.append({**named, **error, "share": ratio if alone else 1 - ratio})
        return rows

    def rows(self) -> list[Row]:
        rows = super().rows()
        self.pipeline.require(self.trajectory)
        return rows

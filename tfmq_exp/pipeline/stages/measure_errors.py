"""Errors of a network against the float one: of temporal features, and along the trajectory."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tfmq_exp.diagnostics.temporal_error import temporal_feature_error
from tfmq_exp.diagnostics.trajectory_error import trajectory_error
from tfmq_exp.pipeline.networks import QuantizedNetwork, SampledNetwork
from tfmq_exp.pipeline.pipeline import Stage

FILE = "errors.json"


@dataclass(eq=False)
class MeasureErrors(Stage):
    """Error curves: of the trajectory of `network`, and of the temporal features of the quantized network behind it."""

    network: SampledNetwork
    quantized: QuantizedNetwork
    stored_as = "diagnostics"

    @property
    def name(self) -> str:
        return f"{self.network.prefix}diagnostics"

    def inputs(self) -> Mapping[str, Any]:
        run = self.run
        return {**run.model_inputs, **self.network.inputs, "diagnostics": run.diagnostics, "seed": run.seed}

    def compute(self, folder: Path) -> None:
        run, images = self.run, self.run.diagnostics
        given = *self.network.sampler(), run.denoiser, run.sampling
        with self.pipeline.progress(self.name, len(run.calls)) as advance:
            along = trajectory_error(*given, images=images, seed=run.seed, each_step=lambda step: advance(step + 1, ""))
        temporal = temporal_feature_error(self.quantized.model, run.denoiser.unet, run.structure)
        self.pipeline.store.write_json(folder / FILE, {"temporal": temporal, "trajectory": along})

    def count(self) -> int:
        return self.run.diagnostics

    def errors(self) -> dict[str, list[dict[str, Any]]]:
        """`temporal`: a row for each timestep; `trajectory`: a row for each step."""
        return self.read_json(FILE)

"""Errors of a network against the float one: of temporal features, and along the trajectory."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tfmq_exp.diagnostics.temporal_error import temporal_feature_error
from tfmq_exp.diagnostics.trajectory_error import trajectory_error
from tfmq_exp.pipeline.networks import QuantizedNetwork, SampledNetwork
from tfmq_exp.pipeline.pipeline import Pipeline, Stage
from tfmq_exp.pipeline.run import Run


class MeasureErrors(Stage):
    """Error curves.

    Args:
        run: the experiment.
        pipeline: that computes it.
        network: whose trajectory is compared.
        simulated: whose temporal features are compared; those of an exported network cannot be read.
    """

    stored_as = "diagnostics"

    def __init__(self, run: Run, pipeline: Pipeline, network: SampledNetwork, simulated: QuantizedNetwork) -> None:
        super().__init__(run, pipeline)
        self.network, self.simulated, self.name = network, simulated, f"{network.prefix}diagnostics"

    @property
    def inputs(self) -> Mapping[str, Any]:
        run = self.run
        return {**run.model_inputs, **self.network.inputs, "diagnostics": run.diagnostics, "seed": run.seed}

    def compute(self, folder: Path) -> None:
        run = self.run
        with self.pipeline.progress.stage(self.name, len(run.calls)) as advance:
            trajectory = trajectory_error(
                *(*self.network.sampler(), run.denoiser, run.sampling),
                images=run.diagnostics.images,
                seed=run.seed,
                each_step=lambda step: advance(step + 1, ""),
            )
        temporal = temporal_feature_error(self.simulated.model, run.denoiser.unet, run.structure)
        self.pipeline.store.write_json(folder / "errors.json", {"temporal": temporal, "trajectory": trajectory})

    def errors(self) -> dict[str, list[dict[str, Any]]]:
        """`temporal`: a row for each timestep; `trajectory`: a row for each step."""
        return json.loads((self.result() / "errors.json").read_text(encoding="utf-8"))

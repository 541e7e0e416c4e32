"""The finished model as an engine executes it: a stage of its own, and images, scores and errors under their own keys."""

import copy
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from tfmq_exp.deploy.engine import Engine, read_manifest
from tfmq_exp.evaluation.evaluator import Evaluator
from tfmq_exp.experiment.results import mean_errors
from tfmq_exp.experiment.stages import Stages
from tfmq_exp.experiment.store import Entry
from tfmq_exp.experiment.tracking import write_csv
from tfmq_exp.methods.correction import NoiseStatistics
from tfmq_exp.reporting.records import ScoreRecord
from tfmq_exp.sampling.sampler import Predict
from tfmq_exp.sampling.sampling import Sampling
from tfmq_exp.surgery.quantized_unet import QuantizedUNet

log = logging.getLogger(__name__)


@dataclass
class DeployedStages(Stages):
    """Stages whose quantized network is the one that an engine executes. Everything up to it is that of the simulation.

    Args:
        engine: what executes.
        simulated: the stages of the simulation.
    """

    engine: Engine = field(kw_only=True)
    simulated: Stages = field(kw_only=True)

    @classmethod
    def of(cls, stages: Stages, engine: Engine) -> "DeployedStages":
        """The same run, continued by an engine."""
        shared: dict[str, Any] = {one.name: getattr(stages, one.name) for one in fields(Stages)}
        return cls(**shared, engine=engine, simulated=stages)

    @cached_property
    def judge(self) -> Evaluator:
        """The simulation's."""
        return self.simulated.judge

    @cached_property
    def quantized_model(self) -> QuantizedUNet:
        """The simulated model that was exported; temporal features are read off it."""
        return self.simulated.quantized_model

    @cached_property
    def statistics(self) -> NoiseStatistics | None:
        """The simulation's, by which the engine's predictions are corrected too."""
        return self.simulated.statistics

    def pull(self, name: str, entry: Entry, compute: Any) -> Path:
        """As ever; the stages of the deployed network are known by the engine's name."""
        own = name in ("images", "scores", "diagnostics")
        return super().pull(f"{self.engine.name} {name}" if own else name, entry, compute)

    @property
    def finished(self) -> Entry:
        """The exported model: depends on the simulated one and on the engine."""
        inputs = {"network": self.simulated.finished.key, "engine": self.engine.identity}
        return self.store.entry("deployed", inputs)

    @property
    def rows(self) -> int:
        """How many rows go through the network together."""
        return min(self.batch, self.images.count) * (2 if self.sampling.guided else 1)

    def example(self) -> dict[str, Tensor]:
        """A forward pass of that many rows."""
        one = self.denoiser.example()
        example = {name: value.cpu().expand(self.rows, *value.shape[1:]).contiguous() for name, value in one.items()}
        return {**example, "timestep": torch.full((self.rows,), self.calls[0])}

    @cached_property
    def chosen_model(self) -> QuantizedUNet:
        """The simulated model on the CPU, with the bits of every step chosen."""
        _ = self.simulated.corrected
        model = self.quantized_model
        return model if self.denoiser.device.type == "cpu" else copy.deepcopy(model).cpu()

    @cached_property
    def exported(self) -> Path:
        """The folder that the engine has filled."""

        def compute(folder: Path) -> None:
            if self.processes.first:
                self.engine.export(self.chosen_model, self.example(), folder)

        return self.pull(self.engine.name, self.finished, compute)

    def sites(self) -> list[Mapping[str, Any]]:
        """Layer by layer: executed in integers, or why not."""
        return read_manifest(self.exported)["sites"]

    @cached_property
    def corrected(self) -> tuple[Predict, Sampling]:
        """The engine's prediction and the sampling, both corrected as the simulation's are."""
        denoiser = self.engine.open(self.chosen_model, self.exported, batch=self.rows)
        correction: Any = self.method.correction
        return correction(self.sampling.predictor(denoiser), self.sampling, self.statistics)

    @property
    def executed_bytes(self) -> int:
        """Size of what the engine needs: its own files, or the artefact where it has none."""
        files = [path for path in self.exported.glob("model.*")]
        return sum(path.stat().st_size for path in files) or self.artefact.stat().st_size

    def record(self, simulated: ScoreRecord) -> ScoreRecord:
        """A row beside the simulation's."""
        scores, _ = self.scores(quantized=True)
        errors, size = self.errors(), self.executed_bytes
        rows = self.sites()
        share = {"layers_integer": sum(row["executed"] == "int8" for row in rows) / len(rows)}
        return replace(
            simulated,
            scores=scores,
            errors=mean_errors(errors),
            choices={**simulated.choices, "engine": self.engine.name},
            weights_bytes=size,
            quantized={**simulated.quantized, **share, "engine": dict(self.engine.identity)},
            cost={**simulated.cost, "size_ratio": size / self.float_bytes},
            keys={name: hit["key"] for name, hit in self.hits.items()},
        )


def save_deployed(deployed: DeployedStages, folder: Path, console: Console) -> None:
    """Where the engine's files are, and which layers it executes in integers."""
    rows, name = deployed.sites(), deployed.engine.name
    write_csv(folder / "sites.csv", [dict(row) for row in rows])
    left = [f"{row['site']} ({row['why']})" for row in rows if row["executed"] != "int8"]
    console.print(
        f"{name}: {len(rows) - len(left)} of {len(rows)} layers in integers, {deployed.executed_bytes / 1e3:.0f} kB, "
        f"{deployed.executed_bytes / deployed.float_bytes:.3f} of fp32: {deployed.exported}",
        highlight=False,
        soft_wrap=True,
    )
    if left:
        console.print(f"  float ({len(left)}): {', '.join(left[:3])}{' …' if len(left) > 3 else ''}", highlight=False)
    log.info("%s: %d of %d layers in integers, %s", name, len(rows) - len(left), len(rows), deployed.exported)

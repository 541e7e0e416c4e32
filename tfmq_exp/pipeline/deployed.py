"""The finished model as an engine executes it: a stage of its own, and images, scores and errors under their own keys."""

import copy
import logging
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from hydra.core.hydra_config import HydraConfig
from rich.console import Console
from torch import Tensor

from tfmq_exp.cli.log_outputs import write_csv
from tfmq_exp.cli.terminal import say
from tfmq_exp.denoisers.unet import attentions
from tfmq_exp.deploy.engine import Engine, read_manifest, write_manifest
from tfmq_exp.evaluation.evaluator import Evaluator
from tfmq_exp.methods.noise_correction import NoiseStatistics
from tfmq_exp.pipeline.score_records import mean_errors
from tfmq_exp.pipeline.stages import Stages
from tfmq_exp.pipeline.store import Entry
from tfmq_exp.report.records import ScoreRecord
from tfmq_exp.report.tables import formats
from tfmq_exp.sampling.guidance import Sampling
from tfmq_exp.sampling.recipe import Recipe
from tfmq_exp.sampling.sampler import Predict
from tfmq_exp.surgery.quantized_unet import QuantizedUNet

FLOAT = "float"  # what a layer is executed in that the engine does not have
OWN = ("images", "scores", "diagnostics")  # stages that a deployed network has beside those of its simulation
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
        return super().pull(f"{self.engine.name} {name}" if name in OWN else name, entry, compute)

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
            if self.processes.is_main:
                self.engine.export(self.chosen_model, self.example(), folder)
                recipe = Recipe.of(self.sampling, self.denoiser)
                write_manifest(folder, {**read_manifest(folder), "sampling": recipe and recipe.to_json()})

        return self.pull(self.engine.name, self.finished, compute)

    def layers(self) -> list[dict[str, Any]]:
        """Every layer: what it is for, and in what it is executed; `float` is what the engine leaves, and why."""
        sites = self.simulated.structure.sites
        rows = read_manifest(self.exported)["sites"]
        return [{"site": row["site"], "role": sites[row["site"]].role.value, **row} for row in rows]

    def products(self) -> list[dict[str, Any]]:
        """Both products of every attention, which no engine has, as further rows of the same table."""
        plain = {"role": "attention products", "executed": FLOAT, "weight_bits": "", "products": 2, "form": ""}
        found: list[dict[str, Any]] = []
        for name in attentions(self.denoiser.unet):
            operands = self.simulated.plan.operands.get(name, {})
            grids = f"; {', '.join(operands)} on their grids in floating point" if operands else ""
            found.append({"site": name, **plain, "why": f"no engine has them{grids}"})
        return found

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
        executed = [row["executed"] for row in self.layers()]
        own = {
            "layers_executed": sum(form != FLOAT for form in executed) / len(executed),
            "executed_in": sorted(set(executed) - {FLOAT}),
            "engine": dict(self.engine.identity),
        }
        return replace(
            simulated,
            scores=scores,
            errors=mean_errors(errors),
            choices={**simulated.choices, **engine_choices(self.engine.name)},
            weights_bytes=size,
            quantized={**simulated.quantized, **own},
            cost={**simulated.cost, "size_ratio": size / self.float_bytes},
            keys={name: key for name, key in simulated.keys.items() if name not in OWN} | self.own_keys(),
        )

    def own_keys(self) -> dict[str, str]:
        """Keys of what was pulled here, by the names that the stages have in a simulation."""
        name = self.engine.name
        stages = {name: name} | {f"{name} {stage}": stage for stage in OWN}
        return {stage: self.hits[pulled]["key"] for pulled, stage in stages.items() if pulled in self.hits}


def engine_choices(name: str) -> dict[str, str]:
    """The engine, and what the command line changed in it; not its threads, which change no number."""
    given = dict(text.split("=", 1) for text in HydraConfig.get().overrides.task if text.startswith("engine."))
    return {"engine": name} | {key: value for key, value in given.items() if key != "engine.threads"}


def save_deployed(deployed: DeployedStages, folder: Path, console: Console) -> None:
    """Where the engine's files are, and which layers it executes."""
    rows, name = deployed.layers(), deployed.engine.name
    write_csv(folder / "sites.csv", [*rows, *deployed.products()])
    left = [f"{row['site']} ({row['why']})" for row in rows if row["executed"] == FLOAT]
    share = f"{len(rows) - len(left)} of {len(rows)} layers in {formats(row['executed'] for row in rows)}"
    say(
        console,
        f"{name}: {share}, {deployed.executed_bytes / 1e3:.0f} kB, "
        f"{deployed.executed_bytes / deployed.float_bytes:.3f} of fp32: {deployed.exported}",
    )
    if left:
        say(console, f"  not ({len(left)}): {', '.join(left[:3])}{' …' if len(left) > 3 else ''}")
    log.info("%s: %s, %s", name, share, deployed.exported)


def save_deployed_errors(deployed: DeployedStages, folder: Path) -> None:
    """How far the engine's trajectory is from the float network's, step by step, in the columns of the simulation's table."""
    write_csv(folder / "trajectory_error_deployed.csv", deployed.errors()["trajectory"])


def reservation(name: str, *, accelerated: bool) -> str:
    """What an estimate says of an engine: nothing can be measured of it before its model is there."""
    where = " on the GPU, wherever the engine runs" if accelerated else ""
    return (
        f"{name}: its sampling is counted at the speed of the simulated network{where}; its export as a pass of one batch, "
        "though building and compiling a graph takes longer"
    )

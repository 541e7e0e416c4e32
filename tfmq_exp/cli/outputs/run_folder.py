"""Files of a run's folder, with their lines on the terminal and their copies on the dashboard."""

import csv
import logging
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from torch import Tensor

from tfmq_exp.cli.outputs.score_table import print_scores
from tfmq_exp.cli.run_info import RunInfo
from tfmq_exp.cli.terminal import say
from tfmq_exp.core.files import write_atomically, write_json, write_record
from tfmq_exp.loggers.base import Logger, Points, Rows, RunMetadata
from tfmq_exp.pipeline.experiment import Experiment
from tfmq_exp.pipeline.run_config import Run
from tfmq_exp.pipeline.stages.evaluation import SampleImages
from tfmq_exp.pipeline.stages.export_engine import FLOAT
from tfmq_exp.pipeline.unit_checkpoints import unit_reports
from tfmq_exp.report import figures
from tfmq_exp.report.records import ScoreRecord
from tfmq_exp.report.tables import executed_dtypes

SHOWN_IMAGES = 64  # of each network in a picture
log = logging.getLogger(__name__)


def write_csv(path: Path, rows: Rows) -> None:
    """Write rows with the same keys as CSV."""

    def write(target: Path) -> None:
        with target.open("w", newline="", encoding="utf-8", errors="backslashreplace") as file:
            writer = csv.DictWriter(file, fieldnames=list(rows[0]) if rows else [])
            writer.writeheader()
            writer.writerows(rows)

    write_atomically(path, write)


def run_metadata(cfg: DictConfig, info: RunInfo, environment: Mapping[str, Any]) -> RunMetadata:
    """Name, group, tags and settings of a run, for a dashboard."""
    settings: Any = OmegaConf.to_container(cfg, resolve=True)
    return RunMetadata(
        folder=info.folder,
        name=info.name,
        group=sweep_name(info.folder, Path(cfg.paths.outputs)) if info.sweep else None,
        kind=cfg.method.name,
        tags=(cfg.model.name, cfg.quant.name),
        choices=info.choices,
        settings={**settings, "environment": dict(environment)},
    )


def sweep_name(folder: Path, outputs: Path) -> str:
    """Common name of a sweep's runs: the folder that holds theirs, with its path below `outputs/sweeps` if it is there."""
    sweep, home = folder.resolve().parent, (outputs / "sweeps").resolve()
    return "-".join(sweep.relative_to(home).parts) if home in sweep.parents else sweep.name


def log_losses(logger: Logger, rows: Rows, shown: Collection[str]) -> None:
    """Log the loss curves that the logger has not got while they grew: those of units that were learned before."""
    for row in rows:
        if (unit := f"{row['phase']}/{row['unit']}") not in shown:
            logger.log_loss(unit, row["iteration"], row["loss"])


def points(rows: Rows, axis: str) -> Points:
    """Numeric columns of a table as curves over one column; sampling step and timestep are axes, no curves."""
    curves = [{k: v for k, v in row.items() if k not in ("step", "t") and isinstance(v, int | float)} for row in rows]
    return [(row[axis], values) for row, values in zip(rows, curves, strict=True)]


def score_summary(records: Sequence[ScoreRecord]) -> dict[str, Any]:
    """Scores, errors and costs of the float network, the simulation and an engine under the names that a dashboard has."""
    original, quantized, *deployed = records
    cost = {key: value for key, value in quantized.cost.items() if isinstance(value, int | float)}
    named = {
        "float_scores": original.scores,
        "scores": quantized.scores,
        "errors": quantized.errors,
        "cost": {**cost, "weights_bytes": quantized.weights_bytes},
        **{f"{record.choices['engine']}_scores": record.scores for record in deployed},
    }
    return {f"{name}/{key}": value for name, values in named.items() for key, value in values.items()}


def report_coverage(covered: Mapping[str, Any], console: Console) -> None:
    """Print what becomes integer and what stays float."""
    say(
        console,
        f"simulated quantization of {covered['layers']} layers: {covered['weight_share']:.1%} of the weights, "
        f"{covered['mac_share_weights_and_inputs']:.1%} of the multiply-accumulates with both operands integer",
    )
    for what in ("weights", "inputs"):
        if names := covered[f"float_{what}"]:
            say(console, f"  float {what} ({len(names)}): {first_few(names, 6)}")
    say(console, f"  attention products: {', '.join(covered['attention_operands']) or 'float'}")


def first_few(names: Sequence[str], count: int) -> str:
    """The first names, and a sign that there are more."""
    return ", ".join(names[:count]) + (" …" if len(names) > count else "")


def warn_of_captions(run: Run) -> None:
    """Warn of captions that the text encoder cuts, and of fewer captions than images."""
    captions = run.captions
    if captions.get("cut"):
        counts = (captions[key] for key in ("cut", "different", "tokens"))
        log.warning("%d of %d captions are longer than the text model takes, and are cut to %d tokens", *counts)
    if captions and captions["different"] < run.images.count:
        log.warning("%d images have %d different captions", run.images.count, captions["different"])


@dataclass(frozen=True)
class RunOutputs:
    """Writes results of an experiment into a folder, prints their sizes and logs them.

    Stages are computed where that was not done; what belongs to later goals than `goals` is not written.
    """

    experiment: Experiment
    folder: Path
    console: Console
    goals: Collection[str]

    @property
    def logger(self) -> Logger:
        """The dashboard."""
        return self.experiment.pipeline.logger

    def table(self, name: str, rows: Rows) -> None:
        """Write and log a table; nothing without rows."""
        if rows:
            write_csv(self.folder / f"{name}.csv", rows)
            self.logger.log_table(name, rows)

    def size(self, what: str, size: int, where: Path) -> None:
        """Print the size of a network's files after what they are."""
        ratio = size / self.experiment.run.float_bytes
        say(self.console, f"{what}{size / 1e3:.0f} kB, {ratio:.3f} of fp32: {where}")
        log.info("%s%d bytes, %.4f of fp32, %s", what, size, ratio, where)

    def save_network(self) -> None:
        """Noise statistics, unit reports, loss curves, and the size of the artefact."""
        experiment = self.experiment
        statistics = experiment.quantized.statistics if "correction" in self.goals else None
        if statistics is not None:
            self.table("noise", rows := statistics.rows())
            self.logger.log_curve("noise", "step", points(rows, "step"))
        if "weights" in self.goals:
            entries = experiment.weights.entry, experiment.activations.entry
            self.table("units", unit_reports(entries, "units.json"))
            if losses := unit_reports(entries, "losses.json"):
                write_csv(self.folder / "losses.csv", losses)
                log_losses(self.logger, losses, experiment.pipeline.shown_losses)
        if "activations" in self.goals:
            artefact = experiment.activations.artefact
            self.size("artefact: ", artefact.stat().st_size, artefact)
            self.save_components()

    def save_components(self) -> None:
        """Bits, sizes and errors of components that were quantized beside the network; nothing where all are float."""
        if not (found := self.experiment.components.record()):
            return
        write_json(self.folder / "components.json", found)
        rows = {"first_stage": found["first_stage"]} if "first_stage" in found else {}
        for name, row in {**rows, **found.get("text_encoders", {})}.items():
            say(
                self.console,
                f"{name} {row['bits']}: {component_error(row)}, {row['bytes'] / row['float_bytes']:.3f} of fp32",
            )

    def save_samples(self, images: SampleImages, name: str, executed_by: str = "") -> None:
        """Float images and those of another network from the same seeds, side by side."""
        pair = _first(self.experiment.float_images.images()), _first(images.images())
        method = self.experiment.run.method.name
        title = f"{method}, executed by {executed_by}" if executed_by else f"quantized: {method}"
        figures.side_by_side(pair, self.folder / f"{name}.png", ("float", title))
        self.logger.log_image(name, self.folder / f"{name}.png")

    def save_deployed(self) -> None:
        """Layers that an engine executes, its images and its errors; nothing without an engine."""
        export, deployed = self.experiment.export, self.experiment.deployed
        if export is None or deployed is None:
            return
        rows = export.layers()
        write_csv(self.folder / "sites.csv", [*rows, *export.attention_products()])
        left = [f"{row['site']} ({row['why']})" for row in rows if row["executed"] == FLOAT]
        share = f"{len(rows) - len(left)} of {len(rows)} layers in {executed_dtypes(row['executed'] for row in rows)}"
        self.size(f"{export.name}: {share}, ", export.executed_bytes, export.result())
        if left:
            say(self.console, f"  not ({len(left)}): {first_few(left, 3)}")
        if "images" in self.goals:
            self.save_samples(deployed.images, "samples_deployed", export.name)
        if "scores" in self.goals:
            write_csv(self.folder / "trajectory_error_deployed.csv", deployed.errors.errors()["trajectory"])

    def save_errors(self, title: str) -> None:
        """The two error curves of the quantized network, as CSV and as plots."""
        axes = {"temporal": ("timestep", "t"), "trajectory": ("step", "step")}
        for curve, rows in self.experiment.simulated.errors.errors().items():
            name, (axis, column) = f"{curve}_error", axes[curve]
            self.table(name, rows)
            figures.error_curves(curve, rows, self.folder / f"{name}.png", f"{curve} error, {title}")
            self.logger.log_curve(name, axis, points(rows, column))
            self.logger.log_image(name, self.folder / f"{name}.png")

    def save_records(self, records: Sequence[ScoreRecord]) -> None:
        """The score records, printed as a table."""
        write_record(self.folder / "results.json", {"rows": [record.to_json() for record in records]})
        self.logger.log_summary(score_summary(records))
        print_scores(records, self.console)


def component_error(row: Mapping[str, Any]) -> str:
    """The error of a quantized component in words."""
    if "relative_error" in row:
        return f"relative error {row['relative_error']:.4f} and cosine {row['cosine']:.5f} of embeddings"
    psnr = "no difference" if row["psnr"] is None else f"PSNR {row['psnr']:.1f} dB"
    return f"{psnr} to the float decoder's images of {row['latents']} latents"


def _first(shards: Iterable[Tensor]) -> np.ndarray:
    images: list[np.ndarray] = []
    for shard in shards:
        images.append(shard.numpy())
        if sum(map(len, images)) >= SHOWN_IMAGES:
            break
    return np.concatenate(images)[:SHOWN_IMAGES]

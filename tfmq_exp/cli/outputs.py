"""Files of a run's folder, with their lines on the terminal and their copies on the dashboard."""

import csv
import logging
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from torch import Tensor

from tfmq_exp.cli.log_outputs import log_losses, points, score_summary
from tfmq_exp.cli.score_table import show
from tfmq_exp.cli.terminal import say
from tfmq_exp.files import write_atomically, write_record
from tfmq_exp.loggers.base import Rows
from tfmq_exp.pipeline.experiment import Experiment
from tfmq_exp.pipeline.run import Run
from tfmq_exp.pipeline.stages.export_engine import FLOAT
from tfmq_exp.pipeline.stages.sample_images import SampleImages
from tfmq_exp.pipeline.unit_checkpoints import unit_reports
from tfmq_exp.reporting import figures
from tfmq_exp.reporting.records import ScoreRecord
from tfmq_exp.reporting.tables import formats

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


def report_coverage(covered: Mapping[str, Any], console: Console) -> None:
    """Print what becomes integer and what stays float."""
    say(
        console,
        f"simulated quantization of {covered['layers']} layers: {covered['weight_share']:.1%} of the weights, "
        f"{covered['mac_share_weights_and_inputs']:.1%} of the multiply-accumulates with both operands integer",
    )
    for what, names in (("weights", covered["float_weights"]), ("inputs", covered["float_inputs"])):
        if names:
            say(console, f"  float {what} ({len(names)}): {first_few(names, 6)}")
    operands = covered["attention_operands"]
    say(console, f"  attention products: {', '.join(operands) if operands else 'float'}")


def first_few(names: Sequence[str], count: int) -> str:
    """The first names, and a sign that there are more."""
    return ", ".join(names[:count]) + (" …" if len(names) > count else "")


def warn_of_captions(run: Run) -> None:
    """Warn of captions that the text encoder cuts, and of fewer captions than images."""
    captions = run.captions
    if captions.get("cut"):
        log.warning(
            "%d of %d captions are longer than the text model takes, and are cut to %d tokens",
            *(captions[key] for key in ("cut", "different", "tokens")),
        )
    if captions and captions["different"] < run.images.count:
        log.warning("%d images have %d different captions", run.images.count, captions["different"])


def save_network(experiment: Experiment, goals: Collection[str], folder: Path, console: Console) -> None:
    """Write noise statistics, unit reports and loss curves, as far as the goals go; print the artefact's size."""
    logger = experiment.pipeline.logger
    statistics = experiment.quantized.statistics if "correction" in goals else None
    if statistics is not None:
        rows = statistics.rows()
        write_csv(folder / "noise.csv", rows)
        logger.table("noise", rows)
        logger.curve("noise", "step", points(rows, "step"))
    if "weights" in goals:
        entries = experiment.weights.entry, experiment.activations.entry
        units, losses = (unit_reports(entries, name) for name in ("units.json", "losses.json"))
        if units:
            write_csv(folder / "units.csv", units)
            logger.table("units", units)
        if losses:
            write_csv(folder / "losses.csv", losses)
            log_losses(logger, losses, experiment.pipeline.shown_losses)
    if "activations" in goals:
        artefact = experiment.activations.artefact
        size = artefact.stat().st_size
        ratio = size / experiment.run.float_bytes
        say(console, f"artefact: {size / 1e3:.0f} kB, {ratio:.3f} of fp32: {artefact}")
        log.info("artefact %s: %d bytes, %.4f of fp32", artefact, size, ratio)


def save_samples(experiment: Experiment, images: SampleImages, path: Path, executed_by: str = "") -> None:
    """Draw float images and those of another network from the same seeds side by side."""
    pair = _first(experiment.float_images.images()), _first(images.images())
    method = experiment.run.method.name
    title = f"{method}, executed by {executed_by}" if executed_by else f"quantized: {method}"
    figures.side_by_side(*pair, path, ("float", title))
    experiment.pipeline.logger.image(path.stem, path)


def _first(shards: Iterable[Tensor]) -> np.ndarray:
    images: list[np.ndarray] = []
    for shard in shards:
        images.append(shard.numpy())
        if sum(map(len, images)) >= SHOWN_IMAGES:
            break
    return np.concatenate(images)[:SHOWN_IMAGES]


def save_deployed(experiment: Experiment, goals: Collection[str], folder: Path, console: Console) -> None:
    """Write which layers an engine executes, its images and its errors, as far as the goals go; nothing without an engine."""
    export, deployed = experiment.export, experiment.deployed
    if export is None or deployed is None:
        return
    rows, name, size = export.layers(), export.engine.name, export.executed_bytes
    write_csv(folder / "sites.csv", [*rows, *export.attention_products()])
    left = [f"{row['site']} ({row['why']})" for row in rows if row["executed"] == FLOAT]
    share = f"{len(rows) - len(left)} of {len(rows)} layers in {formats(row['executed'] for row in rows)}"
    ratio, exported = size / experiment.run.float_bytes, export.result()
    say(console, f"{name}: {share}, {size / 1e3:.0f} kB, {ratio:.3f} of fp32: {exported}")
    if left:
        say(console, f"  not ({len(left)}): {first_few(left, 3)}")
    log.info("%s: %s, %s", name, share, exported)
    if "images" in goals:
        save_samples(experiment, deployed.images, folder / "samples_deployed.png", name)
    if "scores" in goals:
        write_csv(folder / "trajectory_error_deployed.csv", deployed.errors.errors()["trajectory"])


def save_errors(experiment: Experiment, folder: Path, title: str) -> None:
    """Write the two error curves of the quantized network as CSV and as plots."""
    logger = experiment.pipeline.logger
    plots = {"temporal": figures.temporal_error, "trajectory": figures.trajectory_error}
    axes = {"temporal": ("timestep", "t"), "trajectory": ("step", "step")}
    for name, rows in experiment.simulated.errors.errors().items():
        write_csv(folder / f"{name}_error.csv", rows)
        plots[name](rows, folder / f"{name}_error.png", f"{name} error, {title}")
        axis, column = axes[name]
        logger.table(f"{name}_error", rows)
        logger.curve(f"{name}_error", axis, points(rows, column))
        logger.image(f"{name}_error", folder / f"{name}_error.png")


def save_records(records: Sequence[ScoreRecord], experiment: Experiment, folder: Path, console: Console) -> None:
    """Write the score records and print them as a table."""
    write_record(folder / "results.json", {"rows": [record.to_json() for record in records]})
    experiment.pipeline.logger.summary(score_summary(records))
    show(records, console)

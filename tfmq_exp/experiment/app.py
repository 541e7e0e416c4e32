"""One run: from a composed configuration to scores, tables and pictures in the run's folder."""

import functools
import gc
import json
import logging
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.table import Table

from tfmq_exp.experiment.environment import describe_environment, pick_device, prepare
from tfmq_exp.experiment.estimate import show as show_estimate
from tfmq_exp.experiment.estimate import summary
from tfmq_exp.experiment.network_stages import CalibrationPlan
from tfmq_exp.experiment.progress import Bars
from tfmq_exp.experiment.results import score_records
from tfmq_exp.experiment.stages import DiagnosticPlan, Stages
from tfmq_exp.experiment.store import Store, write_json
from tfmq_exp.experiment.survey import estimate
from tfmq_exp.experiment.tracking import Mirror, write_csv
from tfmq_exp.reconstruction.run import Means, quiet_trainer
from tfmq_exp.reporting import figures, tables
from tfmq_exp.reporting.records import ScoreRecord
from tfmq_exp.sampling.images import ImagePlan
from tfmq_exp.sampling.sampling import Sampling
from tfmq_exp.surgery.quantized_unet import coverage

GOALS = ("trajectory", "weights", "activations", "correction", "images", "scores")
log = logging.getLogger(__name__)


def main(cfg: DictConfig) -> None:
    """Run one job; an error is one line on the terminal, its traceback is in the run's log.

    Raises:
        SystemExit: with status 1, when the job failed.
    """
    console = Console()
    try:
        run(cfg, console)
    except (KeyboardInterrupt, SystemExit):
        raise
    except Exception as error:
        root = _root_cause(error)
        console.print(f"[bold red]error:[/] {_one_line(root)}", highlight=False, soft_wrap=True)
        logging.getLogger("tfmq_exp.traceback").debug("the job failed", exc_info=error)
        if cfg.runtime.traceback:
            raise
        raise SystemExit(1) from None
    finally:
        gc.collect()  # trainers and their modules refer to each other, and with them to large tensors; sweeps go on


def _root_cause(error: BaseException) -> BaseException:
    """Hydra wraps what a constructor raises; the user wants the reason."""
    while type(error).__module__.startswith("hydra.") and error.__cause__ is not None:
        error = error.__cause__
    return error


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    expected = isinstance(error, ValueError | OSError | RuntimeError | TypeError | KeyError)
    return text if expected and text else f"{type(error).__name__}: {text}"


def run(cfg: DictConfig, console: Console) -> None:
    """Build the objects, pull the goal, write what was found."""
    if cfg.goal not in GOALS:
        raise ValueError(f"goal must be one of {', '.join(GOALS)}, got {cfg.goal!r}")
    folder = Path(HydraConfig.get().runtime.output_dir)
    prepare(cfg.runtime.threads)
    device = pick_device(cfg.trainer.accelerator)
    environment = describe_environment(device)
    write_json(folder / "environment.json", environment)
    (folder / "config.yaml").write_text(OmegaConf.to_yaml(cfg, resolve=True))
    resolved = OmegaConf.to_container(cfg, resolve=True)
    mirror: Mirror = instantiate(cfg.logger, _partial_=True)(folder=folder, name=folder.name, settings=resolved)
    failed = True
    try:
        began = time.perf_counter()
        stages = build_stages(cfg, device, Bars(console), mirror)
        log.info("simulated quantization: %s, results in %s", cfg.name, folder)
        pull(stages, cfg, folder, console, environment, began)
        failed = False
    finally:
        mirror.close(failed=failed)


def build_stages(cfg: DictConfig, device: torch.device, bars: Bars, mirror: Mirror) -> Stages:
    """All objects of a run. The only place where configuration becomes objects."""
    make: Any = functools.partial(instantiate, _convert_="all")
    denoiser = make(cfg.model.denoiser)
    denoiser.to(device)
    trainer = quiet_trainer("gpu" if device.type == "cuda" else "cpu")
    protocol, runtime = cfg.model.protocol, cfg.runtime
    return Stages(
        denoiser=denoiser,
        sampling=Sampling(make(cfg.sampler), **make(cfg.model.sampling)),
        method=make(cfg.method),
        evaluator=functools.partial(make, cfg.eval),
        calibration=CalibrationPlan(protocol.calibration_images, runtime.batch),
        batch=runtime.batch,
        images=ImagePlan(protocol.images, cfg.seed, runtime.batch, protocol.uint8),
        diagnostics=DiagnosticPlan(protocol.diagnostic_images),
        seed=cfg.seed,
        means=Means(runtime.batch, int(runtime.cache_gib * 2**30), trainer, cache_folder(runtime.cache_dir)),
        store=Store(Path(cfg.paths.store)),
        bars=bars,
        mirror=mirror,
    )


def cache_folder(path: str | None) -> Path | None:
    """Where cached activations may go; made if it is not there."""
    if path is None:
        return None
    Path(path).mkdir(parents=True, exist_ok=True)
    return Path(path)


def pull(
    stages: Stages, cfg: DictConfig, folder: Path, console: Console, environment: Mapping[str, Any], began: float
) -> None:
    """Pull stages up to the goal and write their results."""
    covered = dict(coverage(stages.plan, stages.anatomy))
    write_json(folder / "quantized.json", covered)
    look_ahead(stages, cfg.goal, covered, console)
    if cfg.goal == "trajectory":
        stages.calibration_set()
    elif cfg.goal == "weights":
        stages.weighted_model()
    else:
        _ = stages.quantized_model
    if GOALS.index(cfg.goal) >= GOALS.index("correction") and stages.statistics is not None:
        write_csv(folder / "noise.csv", stages.statistics.rows())
        stages.mirror.table("noise", stages.statistics.rows())
    if GOALS.index(cfg.goal) >= GOALS.index("weights"):
        units = stages.unit_reports()
        if units:
            write_csv(folder / "units.csv", units)
            stages.mirror.table("units", units)
    if GOALS.index(cfg.goal) >= GOALS.index("activations"):
        size = stages.artefact.stat().st_size
        share = size / stages.float_bytes
        console.print(
            f"artefact: {size / 1e3:.0f} kB, {share:.3f} of fp32: {stages.artefact}", highlight=False, soft_wrap=True
        )
        log.info("artefact %s: %d bytes, %.4f of fp32", stages.artefact, size, share)
    if GOALS.index(cfg.goal) >= GOALS.index("images"):
        save_grid(stages, folder)
    if cfg.goal == "scores":
        errors = stages.errors()
        save_errors(errors, folder, stages.mirror, cfg.name)
        records = score_records(stages, cfg, covered, errors, environment, began)
        write_json(folder / "results.json", {"rows": [record.to_json() for record in records]})
        stages.mirror.summary({**records[-1].scores, **records[-1].errors})
        show(records, console)
    write_json(folder / "artifacts.json", stages.hits)
    console.print(f"run folder: {folder}", highlight=False, soft_wrap=True)


def look_ahead(stages: Stages, goal: str, covered: Mapping[str, Any], console: Console) -> None:
    """Before the work starts: is everything there, what becomes integer, how long will it take."""
    if goal == "scores":
        stages.check_reference()
    report_coverage(covered, console)
    expected = estimate(stages, GOALS[: GOALS.index(goal) + 1])
    if expected is not None:
        show_estimate(expected, console)
        log.info("estimate: %s", summary(expected))


def report_coverage(covered: Mapping[str, Any], console: Console) -> None:
    """What becomes integer and what does not."""
    console.print(
        f"simulated quantization of {covered['layers']} layers: {covered['weight_share']:.1%} of the weights, "
        f"{covered['mac_share_weights_and_inputs']:.1%} of the multiply-accumulates with both operands integer",
        highlight=False,
    )
    for what, names in (("weights", covered["float_weights"]), ("inputs", covered["float_inputs"])):
        if names:
            console.print(
                f"  float {what} ({len(names)}): {', '.join(names[:6])}{' …' if len(names) > 6 else ''}",
                highlight=False,
            )
    operands = covered["attention_operands"]
    console.print(f"  attention products: {', '.join(operands) if operands else 'float'}", highlight=False)


def save_grid(stages: Stages, folder: Path) -> None:
    """Float and quantized samples from the same seeds, side by side."""
    quantized = _first(stages.sampled(quantized=True), 64)
    original = _first(stages.sampled(quantized=False), 64)
    figures.side_by_side(original, quantized, folder / "samples.png", ("float", f"quantized: {stages.method.name}"))
    stages.mirror.image("samples", folder / "samples.png")


def _first(shards: Any, count: int) -> np.ndarray:
    taken: list[np.ndarray] = []
    for shard in shards:
        taken.append(shard.numpy())
        if sum(map(len, taken)) >= count:
            break
    return np.concatenate(taken)[:count]


def save_errors(errors: Mapping[str, list[dict[str, Any]]], folder: Path, mirror: Mirror, title: str) -> None:
    """The two error curves as CSV and as plots."""
    plots = {"temporal": figures.temporal_error, "trajectory": figures.trajectory_error}
    for name, rows in errors.items():
        write_csv(folder / f"{name}_error.csv", rows)
        plots[name](rows, folder / f"{name}_error.png", f"{name} error, {title}")
        mirror.table(f"{name}_error", rows)
        mirror.image(f"{name}_error", folder / f"{name}_error.png")


def show(records: list[ScoreRecord], console: Console) -> None:
    """The table at the end of a run."""
    record = records[0]
    title = f"{record.model}, {record.protocol['images']} images, seed {record.seed}, simulated quantization"
    header, rows = tables.table(records)
    view = Table(title=title, title_justify="left")  # one column for each way of quantizing: it fits 80 characters
    for name in ("", *(f"{row[0]} {row[1]}" for row in rows)):
        view.add_column(name, justify="right" if name else "left")
    for i, name in enumerate(header):
        if name not in ("bits", "method", "seeds"):
            view.add_row(name, *(row[i] for row in rows))
    view.add_row("weights, kB", *(f"{record.weights_bytes / 1e3:.0f}" for record in records))
    console.print(view)
    log.debug("results %s", json.dumps([record.scores for record in records]))

"""One run: from a composed configuration to scores, tables and pictures in the run's folder."""

import functools
import logging
import time
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from rich.console import Console

from tfmq_exp.cli.captions import make_sampling, report_captions
from tfmq_exp.cli.dry_run import preview
from tfmq_exp.cli.environment import busy, describe_environment, pick_device, prepare
from tfmq_exp.cli.estimate import show as show_estimate
from tfmq_exp.cli.estimate import summary
from tfmq_exp.cli.launch import together
from tfmq_exp.cli.log_outputs import points, run_card, score_summary, show_losses, write_csv
from tfmq_exp.cli.outcome import attempt
from tfmq_exp.cli.score_table import show
from tfmq_exp.cli.status import State
from tfmq_exp.cli.survey import estimate
from tfmq_exp.cli.terminal import say
from tfmq_exp.cli.validation import DIAGNOSE, EXPORT, GOALS, real_images
from tfmq_exp.core.distributed import ALONE, ProcessGroup
from tfmq_exp.core.files import write_atomically, write_json, write_record
from tfmq_exp.loggers.base import Logger, NullLogger
from tfmq_exp.pipeline.deployed import DeployedStages, save_deployed, save_deployed_errors
from tfmq_exp.pipeline.diagnose import diagnose
from tfmq_exp.pipeline.float_stages import CalibrationPlan
from tfmq_exp.pipeline.progress import ProgressBars
from tfmq_exp.pipeline.score_records import score_records
from tfmq_exp.pipeline.stages import DiagnosisPlan, DiagnosticPlan, Stages
from tfmq_exp.pipeline.store import Store
from tfmq_exp.reconstruction.loop import ComputeConfig, quiet_trainer
from tfmq_exp.report import figures
from tfmq_exp.report.records import ScoreRecord
from tfmq_exp.sampling.images import ImagePlan
from tfmq_exp.sampling.scheduler import replaced_settings
from tfmq_exp.surgery.resolve import coverage

log = logging.getLogger(__name__)


def main(cfg: DictConfig) -> None:
    """Run one job, whether it was finished before or not.

    Raises:
        SystemExit: with status 1, when the job failed and was the only one.
    """
    attempt(cfg, work)


def work(cfg: DictConfig, folder: Path, console: Console) -> tuple[State, str]:
    """Build the objects, pull the goal, write what was found; or only say what that would take."""
    prepare(cfg.runtime.threads)
    device = pick_device(cfg.trainer.accelerator)
    if cfg.dry_run:
        stages = build_stages(cfg, device, ProgressBars(console), NullLogger())
        expected = preview(stages, on_the_way(cfg.goal), console, executed_too(stages, cfg))
        write_json(folder / "estimate.json", {"seconds": 0.0 if expected is None else expected.seconds})
        return "planned", ""
    environment = describe_environment(device)
    write_json(folder / "environment.json", environment)
    settings = OmegaConf.to_yaml(cfg, resolve=True)
    write_atomically(
        folder / "config.yaml", lambda path: path.write_text(settings, encoding="utf-8", errors="backslashreplace")
    )
    mirror: Logger = instantiate(cfg.logger).open(run_card(cfg, folder, environment))
    failed = True
    try:
        began = time.perf_counter()
        log.info("simulated quantization: %s, results in %s", cfg.name, folder)
        with together(cfg, share) as processes:
            stages = build_stages(cfg, device, ProgressBars(console), mirror, processes)
            try:
                pull(stages, cfg, folder, console, environment, began)
            except BaseException:
                with suppress(OSError):  # the disk may be full, which the error says already
                    write_json(folder / "artifacts.json", stages.hits)
                raise
            write_json(folder / "artifacts.json", stages.hits)
        failed = False
    finally:
        mirror.close(failed=failed)
        for line in mirror.where():
            say(console, line)
    say(console, f"run folder: {folder}")
    return "done", ""


def share(cfg: DictConfig, processes: ProcessGroup, scratch: Path) -> None:
    """What another process of the run does: the same as the first, silently, and what it writes is not kept."""
    quiet = Console(quiet=True)
    prepare(cfg.runtime.threads)
    device = pick_device(cfg.trainer.accelerator, processes.rank)
    stages = build_stages(cfg, device, ProgressBars(quiet), NullLogger(), processes)
    pull(stages, cfg, scratch, quiet, describe_environment(device), time.perf_counter())


def build_stages(
    cfg: DictConfig, device: torch.device, bars: ProgressBars, mirror: Logger, processes: ProcessGroup = ALONE
) -> Stages:
    """All objects of a run. The only place where configuration becomes objects."""
    make: Any = functools.partial(instantiate, _convert_="all")
    # first what is made in no time: a number that cannot be right is named before gigabytes are read
    sampling, method = make_sampling(cfg), make(cfg.method)
    method.correction.check(sampling.sampler)
    denoiser = make(cfg.model.denoiser)
    denoiser.to(device)
    sampling.check(denoiser)
    if left := replaced_settings(sampling.sampler, Path(cfg.model.denoiser.get("path") or "")):
        log.warning("%s", left)
    protocol, runtime = cfg.model.protocol, cfg.runtime
    return Stages(
        denoiser=denoiser,
        sampling=sampling,
        method=method,
        real_images=lambda: make(real_images(cfg)),
        evaluator=functools.partial(make, cfg.eval),
        calibration=CalibrationPlan(protocol.calibration_images, runtime.batch),
        batch=runtime.batch,
        images=ImagePlan(protocol.images, cfg.seed, runtime.batch, protocol.uint8),
        diagnostics=DiagnosticPlan(protocol.diagnostic_images),
        diagnosis=DiagnosisPlan(**make(cfg.diagnosis)),
        seed=cfg.seed,
        means=ComputeConfig(
            runtime.batch,
            int(runtime.cache_gib * 2**30) // processes.world_size,
            quiet_trainer(device),
            cache_folder(runtime.cache_dir),
            processes,
            timedelta(minutes=runtime.checkpoint_minutes),
        ),
        store=Store(Path(cfg.paths.store), processes),
        bars=bars,
        mirror=mirror,
    )


def on_the_way(goal: str) -> tuple[str, ...]:
    """All that a run reaches, its goal last."""
    if goal in (DIAGNOSE, EXPORT):
        return (*GOALS[: GOALS.index("correction") + 1], goal)
    return GOALS[: GOALS.index(goal) + 1]


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
    covered, reached = dict(coverage(stages.plan, stages.structure)), on_the_way(cfg.goal)
    deployed = executed_too(stages, cfg)  # first, so that an engine that is not installed says so at once
    write_json(folder / "quantized.json", covered)
    if cfg.goal == "scores":
        stages.check_reference()
    report_coverage(covered, console)
    report_captions(stages)
    if cfg.runtime.estimate and stages.processes.is_main:
        look_ahead(stages, cfg.goal, console, deployed)
    make_network(stages, cfg.goal)
    save_on_the_way(stages, reached, folder, console)
    if cfg.goal == DIAGNOSE:
        diagnose(stages, folder, console, f"{cfg.name}, seed {cfg.seed}")
    if deployed is not None:
        save_executed(deployed, reached, folder, console)
    if cfg.goal == "scores":
        errors = stages.errors()
        save_errors(errors, folder, stages.mirror, cfg.name)
        records = score_records(stages, cfg, covered, errors, environment, began)
        save_records(records if deployed is None else [*records, deployed.record(records[-1])], stages, folder, console)


def executed_too(stages: Stages, cfg: DictConfig) -> DeployedStages | None:
    """The same run with the model executed by an engine, where one is asked for and the run gets that far."""
    if cfg.engine is None or cfg.goal not in (EXPORT, "images", "scores"):
        return None
    return DeployedStages.of(stages, instantiate(cfg.engine))


def make_network(stages: Stages, goal: str) -> None:
    """The quantized network, or what the goal wants of it."""
    if goal == "trajectory":
        stages.calibration_set()
    elif goal == "weights":
        stages.weighted_model()
    else:
        _ = stages.quantized_model
    if goal != "trajectory":
        stages.have_origins(goal)


def save_on_the_way(stages: Stages, reached: Collection[str], folder: Path, console: Console) -> None:
    """What the stages before the scores have to show."""
    if "correction" in reached:
        save_noise(stages, folder)
    if "weights" in reached:
        save_learning(stages, folder)
    if "activations" in reached:
        show_size(stages, console)
    if "images" in reached:
        save_grid(stages, folder, "samples", f"quantized: {stages.method.name}")


def save_executed(deployed: DeployedStages, reached: Collection[str], folder: Path, console: Console) -> None:
    """The same of the model that an engine executes."""
    save_deployed(deployed, folder, console)
    if "images" in reached:
        made_by = f"{deployed.method.name}, executed by {deployed.engine.name}"
        save_grid(deployed, folder, "samples_deployed", made_by)
    if "scores" in reached:
        save_deployed_errors(deployed, folder)


def save_noise(stages: Stages, folder: Path) -> None:
    """Statistics of the quantization noise, for methods that correct it."""
    if stages.statistics is None:
        return
    rows = stages.statistics.rows()
    write_csv(folder / "noise.csv", rows)
    stages.mirror.table("noise", rows)
    stages.mirror.curve("noise", "step", points(rows, "step"))


def save_learning(stages: Stages, folder: Path) -> None:
    """What learning did, unit by unit; nothing for methods that learn nothing."""
    units, losses = stages.noted("units.json"), stages.noted("losses.json")
    if units:
        write_csv(folder / "units.csv", units)
        stages.mirror.table("units", units)
    if losses:
        write_csv(folder / "losses.csv", losses)
        show_losses(stages.mirror, losses, stages.shown_losses)


def look_ahead(stages: Stages, goal: str, console: Console, deployed: DeployedStages | None) -> None:
    """Before the work starts: how long will it take, and how much memory."""
    expected = estimate(stages, on_the_way(goal), deployed=deployed)
    if expected is not None:
        show_estimate(expected, console)
        log.info("estimate: %s", summary(expected))
        if note := busy():
            say(console, note)
        if stages.processes.world_size > 1:
            say(console, f"  by one process; {stages.processes.world_size} share it")


def report_coverage(covered: Mapping[str, Any], console: Console) -> None:
    """What becomes integer and what does not."""
    say(
        console,
        f"simulated quantization of {covered['layers']} layers: {covered['weight_share']:.1%} of the weights, "
        f"{covered['mac_share_weights_and_inputs']:.1%} of the multiply-accumulates with both operands integer",
    )
    for what, names in (("weights", covered["float_weights"]), ("inputs", covered["float_inputs"])):
        if names:
            say(console, f"  float {what} ({len(names)}): {', '.join(names[:6])}{' …' if len(names) > 6 else ''}")
    operands = covered["attention_operands"]
    say(console, f"  attention products: {', '.join(operands) if operands else 'float'}")


def show_size(stages: Stages, console: Console) -> None:
    """Where the artefact is, and how large."""
    size = stages.artefact.stat().st_size
    share = size / stages.float_bytes
    say(console, f"artefact: {size / 1e3:.0f} kB, {share:.3f} of fp32: {stages.artefact}")
    log.info("artefact %s: %d bytes, %.4f of fp32", stages.artefact, size, share)


def save_grid(stages: Stages, folder: Path, name: str, made_by: str) -> None:
    """Float and quantized samples from the same seeds, side by side."""
    quantized = _first(stages.sampled(quantized=True), 64)
    original = _first(stages.sampled(quantized=False), 64)
    figures.side_by_side(original, quantized, folder / f"{name}.png", ("float", made_by))
    stages.mirror.image(name, folder / f"{name}.png")


def _first(shards: Any, count: int) -> np.ndarray:
    taken: list[np.ndarray] = []
    for shard in shards:
        taken.append(shard.numpy())
        if sum(map(len, taken)) >= count:
            break
    return np.concatenate(taken)[:count]


def save_errors(errors: Mapping[str, list[dict[str, Any]]], folder: Path, mirror: Logger, title: str) -> None:
    """The two error curves as CSV and as plots."""
    plots = {"temporal": figures.temporal_error, "trajectory": figures.trajectory_error}
    axes = {"temporal": ("timestep", "t"), "trajectory": ("step", "step")}
    for name, rows in errors.items():
        write_csv(folder / f"{name}_error.csv", rows)
        plots[name](rows, folder / f"{name}_error.png", f"{name} error, {title}")
        axis, column = axes[name]
        mirror.table(f"{name}_error", rows)
        mirror.curve(f"{name}_error", axis, points(rows, column))
        mirror.image(f"{name}_error", folder / f"{name}_error.png")


def save_records(records: Sequence[ScoreRecord], stages: Stages, folder: Path, console: Console) -> None:
    """The rows of the table: float, simulated, and executed by an engine."""
    write_record(folder / "results.json", {"rows": [record.to_json() for record in records]})
    stages.mirror.summary(score_summary(records))
    show(records, console)

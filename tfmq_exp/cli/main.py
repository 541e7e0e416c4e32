"""One run: from a composed configuration to the experiment, and what it writes into the run's folder."""

import logging
import multiprocessing
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig
from rich.console import Console

from tfmq_exp.cli.dry_run import expected_cost, preview, print_estimate
from tfmq_exp.cli.environment import describe_environment, pick_device, prepare
from tfmq_exp.cli.finished_jobs import claim
from tfmq_exp.cli.launch import together
from tfmq_exp.cli.make_run import make_run
from tfmq_exp.cli.outputs.comparison import save_comparison, save_page
from tfmq_exp.cli.outputs.diagnosis import save_diagnoses
from tfmq_exp.cli.outputs.run_folder import RunOutputs, report_coverage, run_metadata, warn_of_captions
from tfmq_exp.cli.outputs.score_records import score_records
from tfmq_exp.cli.run_info import current_run
from tfmq_exp.cli.status import State
from tfmq_exp.cli.terminal import ProgressBars, say
from tfmq_exp.cli.validation import COMPARE, DIAGNOSE, EXPORT, GOALS
from tfmq_exp.core.distributed import ALONE, ProcessGroup
from tfmq_exp.core.files import write_json
from tfmq_exp.deploy.engine import require_executable
from tfmq_exp.loggers.base import Logger
from tfmq_exp.pipeline.experiment import Experiment
from tfmq_exp.pipeline.pipeline import Pipeline, Progress
from tfmq_exp.pipeline.store import Store
from tfmq_exp.surgery.resolve import coverage

log = logging.getLogger(__name__)


def work(cfg: DictConfig, folder: Path, console: Console) -> tuple[State, str]:
    """Compute the goal and write the results; in a dry run, show what that would take."""
    prepare(cfg.runtime.threads)
    device, info, began = pick_device(cfg.device), current_run(), time.perf_counter()
    alone = multiprocessing.parent_process() is None or info.job_number is None
    progress = ProgressBars(console, "" if alone else f"job {info.job_number}").stage
    if cfg.dry_run:
        experiment = make_experiment(cfg, device, progress, folder=info.folder)
        seconds = preview(experiment, goals_up_to(cfg.until), console)
        write_json(folder / "estimate.json", {"seconds": seconds})
        return "planned", ""
    claim(folder, cfg)
    environment = describe_environment(device)
    write_json(folder / "environment.json", environment)
    logger: Logger = instantiate(cfg.logger).open(run_metadata(cfg, info, environment))
    failed = True
    try:
        log.info("simulated quantization: %s, results in %s", cfg.name, folder)
        with together(cfg, share) as group:
            experiment = make_experiment(cfg, device, progress, logger, group, info.folder)
            try:
                _execute(experiment, cfg, folder, environment, console, began)
            except BaseException:
                with suppress(OSError):  # the disk may be full, which the error says already
                    write_json(folder / "artifacts.json", experiment.pipeline.stage_log)
                raise
            write_json(folder / "artifacts.json", experiment.pipeline.stage_log)
        failed = False
    finally:
        logger.close(failed=failed)
        for line in logger.locations():
            say(console, line)
    say(console, f"run folder: {folder}")
    return "done", ""


def share(cfg: DictConfig, group: ProcessGroup, scratch: Path) -> None:
    """Take part in a run as another process: the same work, silently; what it writes into its folder is not kept."""
    quiet = Console(quiet=True)
    prepare(cfg.runtime.threads)
    device = pick_device(cfg.device, group.rank)
    experiment = make_experiment(cfg, device, ProgressBars(quiet).stage, group=group, folder=scratch)
    _execute(experiment, cfg, scratch, describe_environment(device), quiet, time.perf_counter())


def make_experiment(
    cfg: DictConfig,
    device: torch.device,
    progress: Progress,
    logger: Logger | None = None,
    group: ProcessGroup = ALONE,
    folder: Path | None = None,
) -> Experiment:
    """The stages of a run, and those of an engine where one is asked for and the goal gets that far.

    Args:
        cfg: composed configuration.
        device: of the networks.
        progress: display.
        logger: dashboard; none by default.
        group: processes of the run.
        folder: of the run, in which real images are not looked for; None outside Hydra's jobs.
    """
    # the engine first, which says at once if it is not installed
    engine = instantiate(cfg.engine) if cfg.until in (EXPORT, "images", COMPARE, "scores") else None
    run = make_run(cfg, device, folder or Path.cwd(), group)
    if engine:
        require_executable(run.denoiser)
    return Experiment(run, Pipeline(Store(Path(cfg.paths.store), group), progress, logger or Logger()), engine)


def goals_up_to(goal: str) -> tuple[str, ...]:
    """Goals that a run reaches, its own last."""
    if goal in (DIAGNOSE, EXPORT):
        return (*GOALS[: GOALS.index("correction") + 1], goal)
    if goal == COMPARE:
        return (*GOALS[: GOALS.index("images") + 1], goal)
    return GOALS[: GOALS.index(goal) + 1]


def _execute(
    experiment: Experiment,
    cfg: DictConfig,
    folder: Path,
    environment: Mapping[str, Any],
    console: Console,
    began: float,
) -> None:
    """Compute the stages up to the goal and write their results; the run began at `began` of `time.perf_counter()`."""
    run, goals = experiment.run, goals_up_to(cfg.until)
    experiment.check_memory(goals)
    covered = dict(coverage(run.resolved, run.structure))
    write_json(folder / "quantized.json", covered)
    if cfg.until == "scores":
        experiment.reference.check_size()
    elif cfg.until == DIAGNOSE:
        experiment.similarity.check_words()
    report_coverage(covered, console)
    if experiment.pipeline.group.is_main:
        warn_of_captions(run)
        if cfg.runtime.estimate and (expected := expected_cost(experiment, goals)) is not None:
            print_estimate(expected, console, experiment.pipeline.group.world_size)
            log.info("estimate: %s", expected)
    experiment.make_network(cfg.until)
    outputs = RunOutputs(experiment, folder, console, goals)
    outputs.save_network()
    if cfg.until == DIAGNOSE:
        save_diagnoses(experiment, folder / "diagnosis", console, f"{cfg.name}, seed {cfg.seed}")
    if "images" in goals:
        outputs.save_samples(experiment.simulated.images, "samples")
    outputs.save_deployed()
    if cfg.until in (COMPARE, "scores"):
        save_comparison(experiment, folder)
    if cfg.until == COMPARE:
        save_page(experiment, folder, console, (cfg.quant.name, cfg.method.name), cfg.seed)
    if cfg.until == "scores":
        outputs.save_errors(cfg.name)
        outputs.save_records(score_records(experiment, cfg, current_run().overrides, covered, environment, began))

"""Dry run: which stages of a job are in the store, and what the others will take."""

from collections.abc import Collection
from typing import Literal

from rich.console import Console
from rich.table import Table

from tfmq_exp.cli.estimate import Estimate, estimate, print_estimate
from tfmq_exp.core.formatting import format_duration
from tfmq_exp.pipeline.experiment import Experiment
from tfmq_exp.pipeline.pipeline import Stage

Found = Literal["found", "begun", "to be made"]


def state(stage: Stage) -> Found:
    """State of a stage in the store."""
    if stage.entry.done:
        return "found"
    return "begun" if (stage.entry.path / "inputs.json").is_file() else "to be made"


def preview(experiment: Experiment, goals: Collection[str], console: Console) -> float:
    """Print the stages up to the last of the goals and the estimate of those that are missing; returns its seconds."""
    view = Table(title=f"up to {tuple(goals)[-1]}: nothing is computed", title_justify="left")
    for name in ("stage", "key", "state", "took"):
        view.add_column(name, justify="right" if name == "took" else "left", overflow="fold")
    stages = experiment.stages(goals)
    if (trajectory := experiment.trajectory) not in stages:
        view.add_row(trajectory.name, trajectory.key, "found" if trajectory.entry.done else "not needed", "")
    for stage in stages:
        seconds = stage.entry.seconds
        view.add_row(stage.name, stage.key, state(stage), "" if seconds is None else format_duration(seconds))
    console.print(view)
    if (expected := expected_cost(experiment, goals)) is None:
        return 0.0
    print_estimate(expected, console)
    return expected.seconds


def expected_cost(experiment: Experiment, goals: Collection[str]) -> Estimate | None:
    """Estimate of the stages that are missing; None if none of them takes long."""
    engine = experiment.export.engine.name if experiment.export else ""
    return estimate(experiment.run, experiment.missing(goals), engine)

"""Expected cost of a run: which of its stages are in the store, and the estimate of the others."""

import os
import resource
from collections.abc import Collection, Sequence
from typing import Literal, NamedTuple

from rich.console import Console
from rich.table import Table

from tfmq_exp.cli.estimate import NOT_ESTIMATED, StageEstimate, estimate
from tfmq_exp.cli.terminal import say
from tfmq_exp.core.formatting import format_bytes, format_duration
from tfmq_exp.pipeline.experiment import Experiment
from tfmq_exp.pipeline.pipeline import Stage


class Estimate(NamedTuple):
    """Cost of a run, stage by stage, on top of the bytes `process` that are allocated already."""

    stages: Sequence[StageEstimate]
    process: int
    accelerated: bool = False
    note: str = ""

    @property
    def seconds(self) -> float:
        return sum(stage.seconds for stage in self.stages)

    def memory(self, stage: StageEstimate) -> float:
        """Peak bytes of a stage: of the accelerator, or of the host where there is none."""
        return stage.device if self.accelerated else self.process + stage.device + stage.host

    def __str__(self) -> str:
        peak, disk = max(map(self.memory, self.stages)), sum(stage.disk for stage in self.stages)
        host = self.process + max(stage.host for stage in self.stages) if self.accelerated else peak
        on_device = f"{format_bytes(peak)} on the GPU, " if self.accelerated else ""
        rest = f"{format_bytes(host)} of memory, {format_bytes(disk)} on disk"
        return f"{format_duration(self.seconds)}, {on_device}{rest}"


def expected_cost(experiment: Experiment, goals: Collection[str]) -> Estimate | None:
    """Estimate of the stages that are missing; None if none of them takes long, or where the network is not in memory."""
    if experiment.run.denoiser.shards:
        return None
    run, engine, note = experiment.run, experiment.export.name if experiment.export else "", ""
    process = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    if not (stages := estimate(run, missing := experiment.missing(goals), engine)):
        return None
    if engine and any(name.startswith(engine) for name in missing):
        note = f"{engine}: its sampling is counted at the speed of the simulated network, its export as a pass of one batch"
    if left_out := [name for name in missing if name in NOT_ESTIMATED]:
        note = "; ".join(filter(None, (note, f"not estimated: {', '.join(left_out)}")))
    return Estimate(stages, process, run.denoiser.device.type != "cpu", note)


def state(stage: Stage) -> Literal["found", "begun", "to be made"]:
    """State of a stage in the store."""
    if stage.entry.done:
        return "found"
    return "begun" if (stage.entry.path / "inputs.json").is_file() else "to be made"


def preview(experiment: Experiment, goals: Collection[str], console: Console) -> float:
    """Print the stages up to the last of the goals and the estimate of those that are missing; returns its seconds."""
    view = Table("stage", "key", "state", title=f"up to {tuple(goals)[-1]}: nothing is computed", title_justify="left")
    view.add_column("took", justify="right")
    stages = experiment.stages(goals)
    if (trajectory := experiment.trajectory) not in stages:
        view.add_row(trajectory.name, trajectory.key, "found" if trajectory.entry.done else "not needed", "")
    for stage in stages:
        seconds = stage.entry.seconds
        view.add_row(stage.name, stage.key, state(stage), "" if seconds is None else format_duration(seconds))
    for column in view.columns:
        column.overflow = "fold"
    console.print(view)
    if (expected := expected_cost(experiment, goals)) is None:
        return 0.0
    print_estimate(expected, console)
    return expected.seconds


def print_estimate(expected: Estimate, console: Console, processes: int = 1) -> None:
    """Print totals and a table of the stages. Scoring, loading and saving are not included."""
    say(console, f"estimate: {expected}")
    table = Table()
    for name in ("stage", "time", "share", "GPU memory" if expected.accelerated else "memory"):
        table.add_column(name, justify="left" if name == "stage" else "right", overflow="fold")
    for stage in expected.stages:
        share = f"{stage.seconds / max(expected.seconds, 1e-9):.0%}"
        table.add_row(stage.name, format_duration(stage.seconds), share, format_bytes(expected.memory(stage)))
    console.print(table)
    load, cores = os.getloadavg()[0], len(os.sched_getaffinity(0))
    if expected.note:
        say(console, expected.note)
    if load > cores + 0.5:
        say(console, f"measured on a busy machine (load {load:.1f} on {cores} cores): faster when others are done")
    if processes > 1:
        say(console, f"  by one process; {processes} share it")

"""A dry run: which stages of a job are in the store, and what the others will take."""

from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from rich.console import Console
from rich.table import Table

from tfmq_exp.cli.estimate import Estimate, estimate, print_estimate
from tfmq_exp.core.formatting import format_duration
from tfmq_exp.pipeline.deployed import DeployedStages
from tfmq_exp.pipeline.diagnose import Diagnosis
from tfmq_exp.pipeline.stages import Stages
from tfmq_exp.pipeline.store import Entry, Store

Found = Literal["found", "begun", "to be made", "not needed"]


class NotThere(LookupError):  # noqa: N818
    """An entry that a dry run would have to make."""


@dataclass(frozen=True)
class Shelf(Store):
    """A store that is only looked at; it remembers what was asked for, by stage."""

    seen: dict[str, Entry] = field(default_factory=dict)

    def pull(self, entry: Entry, compute: Callable[[Path], None], seconds: object = None) -> bool:
        """Found, or an error.

        Raises:
            NotThere: the entry is not finished.
        """
        self.seen[entry.stage] = entry
        if not entry.done:
            raise NotThere(entry.stage)
        return False


@dataclass(frozen=True)
class Line:
    """One stage; the key is None where it depends on one that is not there yet."""

    stage: str
    entry: Entry | None
    needed: bool = True

    @property
    def state(self) -> Found:
        """What the store knows of it."""
        if self.entry is not None and self.entry.done:
            return "found"
        if not self.needed:
            return "not needed"
        return "begun" if self.entry is not None and (self.entry.path / "inputs.json").is_file() else "to be made"


def lines(stages: Stages, goals: Collection[str], deployed: DeployedStages | None = None) -> list[Line]:
    """Every stage up to the goal, those of an engine after the simulation's; nothing is made.

    Args:
        stages: the run.
        goals: `trajectory`, `weights`, ... up to the one that the run is to reach.
        deployed: the same run with the model executed by an engine, where one is asked for.
    """
    goal = tuple(goals)[-1]
    data = {name: entry for name, entry, _ in stages.data(goal)}
    found = [Line("trajectory", stages.trajectory, "trajectory" in data or goal in ("trajectory", "diagnose"))]
    if "weights" in goals:
        found += [Line(name, entry) for name, entry in data.items() if name != "trajectory"]
        found.append(Line("weights", stages.weights))
    if "activations" in goals:
        found.append(Line("activations", stages.activations))
    if "correction" in goals and stages.correction is not None:
        found.append(Line("correction", stages.correction))
    if "images" in goals:
        found.append(Line("float images", stages.images_entry(quantized=False)))
        found.append(Line("images", stages.images_entry(quantized=True)))
    if "scores" in goals:
        found += [
            Line("reference", looked_up(stages, "reference", lambda: stages.reference(stages.judge))),
            Line("float scores", looked_up(stages, "scores", lambda: stages.scores(quantized=False))),
            Line("scores", looked_up(stages, "scores", lambda: stages.scores(quantized=True))),
            Line("diagnostics", looked_up(stages, "diagnostics", stages.errors)),
        ]
    if "diagnose" in goals:
        of = Diagnosis(stages)
        asked = (of.rounding, of.features, of.accumulation, of.ranges, of.sensitivity)
        found += [Line(name, looked_up(stages, name, ask)) for ask in asked if (name := f"diagnosis_{ask.__name__}")]
    return found if deployed is None else [*found, *engine_lines(deployed, goals)]


def engine_lines(deployed: DeployedStages, goals: Collection[str]) -> list[Line]:
    """The stages that an engine adds, as they are called in a run's `artifacts.json`."""
    name = deployed.engine.name
    found = [Line(name, deployed.finished)]
    if "images" in goals:
        found.append(Line(f"{name} images", deployed.images_entry(quantized=True)))
    if "scores" in goals:
        found += [
            Line(f"{name} scores", looked_up(deployed, "scores", lambda: deployed.scores(quantized=True))),
            Line(f"{name} diagnostics", looked_up(deployed, "diagnostics", deployed.errors)),
        ]
    return found


def looked_up(stages: Stages, stage: str, ask: Callable[[], object]) -> Entry | None:
    """The entry that a stage asks the store for, which is the only one who knows; None where it does not come to that."""
    store, pulled, shelf = stages.store, stages.pulled, Shelf(stages.store.root)
    stages.store, stages.pulled = shelf, set()  # what is known already is asked for again
    try:
        ask()
    except NotThere:
        pass
    finally:
        stages.store, stages.pulled = store, pulled
    return shelf.seen.get(stage)


def preview(
    stages: Stages, goals: Collection[str], console: Console, deployed: DeployedStages | None = None
) -> Estimate | None:
    """The stages as a table, and the estimate of those that are missing, which is returned; None if none is."""
    view = Table(title=f"up to {tuple(goals)[-1]}: nothing is computed", title_justify="left")
    for name in ("stage", "key", "state", "took"):
        view.add_column(name, justify="right" if name == "took" else "left", overflow="fold")
    for line in lines(stages, goals, deployed):
        took = line.entry.took if line.state == "found" and line.entry is not None else None
        key = "" if line.entry is None else line.entry.key
        view.add_row(line.stage, key, line.state, "" if took is None else format_duration(took))
    console.print(view)
    expected = estimate(stages, missing_stages(stages, goals, deployed), deployed.engine.name if deployed else "")
    if expected is not None:
        print_estimate(expected, console)
    return expected


def missing_stages(
    stages: Stages, goals: Collection[str], deployed: DeployedStages | None = None
) -> dict[str, int | None]:
    """Stages that are to be made, with the amount of each as `estimate` takes it."""
    learns, goal = "weights" in goals, tuple(goals)[-1]
    engine = "" if deployed is None else deployed.engine.name
    missing: dict[str, int | None] = {}
    if learns and not stages.weights.done:
        missing["weights"] = finished_parts(stages.weights)
    if "activations" in goals and not stages.activations.done:
        missing["activations"] = finished_parts(stages.activations)
    if (missing or goal == "trajectory") and (stages.follows_trajectories or not learns) and not stages.trajectory.done:
        missing = {"trajectory": None, **missing}
    if "correction" in goals and stages.correction is not None and not stages.correction.done:
        missing["correction"] = None
    if deployed is not None and not deployed.finished.done:
        missing[engine] = None
    if "images" in goals:
        entries = {"float images": stages.images_entry(quantized=False), "images": stages.images_entry(quantized=True)}
        entries |= {f"{engine} images": deployed.images_entry(quantized=True)} if deployed else {}
        left = {name: images_left(stages, entry) for name, entry in entries.items()}
        missing |= {name: count for name, count in left.items() if count}
        if "scores" in goals:
            compared = {name.replace("images", "diagnostics"): name for name in entries if name != "float images"}
            missing |= {name: stages.diagnostics.images for name, images in compared.items() if images in missing}
    return missing | (Diagnosis(stages).passes() if "diagnose" in goals else {})


def images_left(stages: Stages, entry: Entry) -> int:
    """Images that no shard holds yet."""
    made = [entry.path / f"images-{shard.start:06d}.safetensors" for shard in stages.images.shards()]
    return sum(len(shard) for shard, path in zip(stages.images.shards(), made, strict=True) if not path.is_file())


def finished_parts(entry: Entry) -> int:
    """Units, or iterations of a training, that an interrupted attempt has left in an entry."""
    iterations = [int(path.stem) for path in entry.path.glob("checkpoints/*.ckpt")]
    return max(iterations, default=len(list(entry.path.glob("units/*.safetensors"))))

"""What a run still has to do, as far as that can be counted without a look at the network."""

from collections.abc import Collection
from typing import Any

from tfmq_exp.cli.estimate import Counts
from tfmq_exp.pipeline.deployed import DeployedStages
from tfmq_exp.pipeline.diagnose import Diagnosis
from tfmq_exp.pipeline.stages import Stages
from tfmq_exp.pipeline.store import Entry


def still_to_do(stages: Stages, goals: Collection[str], deployed: DeployedStages | None = None) -> Counts:
    """Everything but the phases' own work.

    Args:
        stages: the run.
        goals: `trajectory`, `weights`, ... up to the one that the run is to reach.
        deployed: the same run with the model executed by an engine, where one is asked for.
    """
    correction: Any = stages.method.correction
    last = "activations" if "activations" in goals else "weights" if "weights" in goals else None
    phases: list[str] = []
    if last is not None and not stages.weights.done:
        phases.append("weights")
    if last == "activations" and not stages.activations.done:
        phases.append("activations")
    images = images_to_make(stages, deployed) if "images" in goals else {}
    noise = stages.correction if "correction" in goals else None
    width_choices = max(len(line.input.specs) if line.input else 1 for line in stages.plan.sites.values())
    wanted = stages.follows_trajectories or last is None
    engine = "" if deployed is None else deployed.engine.name
    compared = stages.diagnostics.images if "scores" in goals else 0
    return Counts(
        calls=len(stages.calls),
        timesteps=len(set(stages.calls)),
        halves=2 if stages.sampling.guided else 1,
        batch=stages.batch,
        cache=stages.means.cache_bytes,
        trajectories=stages.calibration.images,
        collecting=bool(phases or "trajectory" in goals) and wanted and not stages.trajectory.done,
        # grids are placed for learning, and before it for the ranges of activations that are learned together with weights
        grids=("weights" in phases) * (2 if "activations" in stages.method.weights.learns else 1),
        phases=tuple(phases),
        correction=correction.images if noise and not noise.done else 0,
        widths=width_choices,
        images=images,
        diagnostics=compared if "images" in images else 0,
        passes=Diagnosis(stages).passes() if "diagnose" in goals else {},
        engine=engine,
        exporting=deployed is not None and not deployed.finished.done,
        engine_diagnostics=compared if f"{engine} images" in images and engine else 0,
    )


def images_to_make(stages: Stages, deployed: DeployedStages | None) -> dict[str, int]:
    """Images of the float network, of the simulated one and of an engine's, by stage; no stage of which all are there."""
    entries = {"float images": stages.images_entry(quantized=False), "images": stages.images_entry(quantized=True)}
    if deployed is not None:
        entries[f"{deployed.engine.name} images"] = deployed.images_entry(quantized=True)
    return {name: left for name, entry in entries.items() if (left := images_left(stages, entry))}


def images_left(stages: Stages, entry: Entry) -> int:
    """Images that no shard holds yet."""
    made = [entry.path / f"images-{shard.start:06d}.safetensors" for shard in stages.images.shards()]
    return sum(len(shard) for shard, path in zip(stages.images.shards(), made, strict=True) if not path.is_file())

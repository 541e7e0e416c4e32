"""What a run still has to do, as far as that can be counted without a look at the network."""

from collections.abc import Collection

from tfmq_exp.cli.estimate import Counts
from tfmq_exp.pipeline.experiment import Experiment


def still_to_do(experiment: Experiment, goals: Collection[str]) -> Counts:
    """Everything but the phases' own work.

    Args:
        experiment: the stages.
        goals: `trajectory`, `weights`, ... up to the one that the run is to reach.
    """
    run, deployed = experiment.run, experiment.deployed
    last = "activations" if "activations" in goals else "weights" if "weights" in goals else None
    phases: list[str] = []
    if last is not None and not experiment.weights.entry.done:
        phases.append("weights")
    if last == "activations" and not experiment.activations.entry.done:
        phases.append("activations")
    images = images_to_make(experiment) if "images" in goals else {}
    noise = experiment.correction if "correction" in goals else None
    width_choices = max(len(line.input.specs) if line.input else 1 for line in run.resolved.sites.values())
    wanted = run.follows_trajectories or last is None
    engine = experiment.export.engine.name if experiment.export else ""
    compared = run.diagnostics.images if "scores" in goals else 0
    diagnoses = experiment.diagnoses if "diagnose" in goals else ()
    passes = {stage.name: stage.passes() for stage in diagnoses if not stage.entry.done and stage.passes()}
    return Counts(
        calls=len(run.calls),
        timesteps=len(set(run.calls)),
        halves=2 if run.sampling.guided else 1,
        batch=run.compute.batch,
        cache=run.compute.cache_bytes,
        trajectories=run.calibration.images,
        collecting=bool(phases or "trajectory" in goals) and wanted and not experiment.trajectory.entry.done,
        # grids are placed for learning, and before it for the ranges of activations that are learned together with weights
        grids=("weights" in phases) * (2 if "activations" in run.method.weights.learns else 1),
        phases=tuple(phases),
        correction=noise.correction.images if noise and not noise.entry.done else 0,
        widths=width_choices,
        images=images,
        diagnostics=compared if "images" in images else 0,
        passes=passes,
        engine=engine,
        exporting=experiment.export is not None and not experiment.export.entry.done,
        engine_diagnostics=compared if deployed and deployed.images.name in images else 0,
    )


def images_to_make(experiment: Experiment) -> dict[str, int]:
    """Images of the float network, of the simulated one and of an engine's, by stage; no stage of which all are there."""
    stages = [experiment.float_images, experiment.simulated.images]
    stages += [experiment.deployed.images] if experiment.deployed else []
    return {stage.name: left for stage in stages if (left := stage.missing())}

"""All stages of a run, each connected with those whose results it reads."""

from collections.abc import Collection, Sequence
from typing import NamedTuple

from tfmq_exp.deploy.engine import Engine
from tfmq_exp.pipeline.networks import QuantizedNetwork, SampledNetwork
from tfmq_exp.pipeline.pipeline import Pipeline, Stage
from tfmq_exp.pipeline.run import Run
from tfmq_exp.pipeline.stages.calibrate_activations import CalibrateActivations
from tfmq_exp.pipeline.stages.collect_trajectory import CollectTrajectory
from tfmq_exp.pipeline.stages.diagnose import (
    ActivationRanges,
    Diagnosis,
    ErrorAccumulation,
    TemporalFeatures,
    UnitSensitivity,
    WeightRounding,
)
from tfmq_exp.pipeline.stages.encode_examples import EncodeExamples
from tfmq_exp.pipeline.stages.export_engine import ExportEngine
from tfmq_exp.pipeline.stages.fit_correction import FitCorrection
from tfmq_exp.pipeline.stages.measure_errors import MeasureErrors
from tfmq_exp.pipeline.stages.reconstruct_weights import ReconstructWeights
from tfmq_exp.pipeline.stages.sample_images import SampleImages
from tfmq_exp.pipeline.stages.score_images import ComputeReference, ScoreImages
from tfmq_exp.pipeline.stages.train_weights import TrainWeights


class Evaluation(NamedTuple):
    """Stages that evaluate one quantized network."""

    images: SampleImages
    scores: ScoreImages
    errors: MeasureErrors


class Experiment:
    """The stages of a run.

    Args:
        run: the configuration.
        pipeline: that computes them.
        engine: executes the finished network as well, and is evaluated like the simulation.
    """

    def __init__(self, run: Run, pipeline: Pipeline, engine: Engine | None = None) -> None:
        self.run, self.pipeline = run, pipeline
        self.trajectory = CollectTrajectory(run, pipeline)
        self.examples: EncodeExamples | None = None
        weights = run.method.weights
        if weights.trains is True:
            self.examples = EncodeExamples(run, pipeline, weights.protocol.horizontal_flip)
            self.weights = TrainWeights(run, pipeline, weights, self.examples)
        else:
            self.weights = ReconstructWeights(run, pipeline, weights, self.trajectory)
        self.activations = CalibrateActivations(run, pipeline, self.trajectory, self.weights)
        self.correction: FitCorrection | None = None
        if (correction := run.method.correction).measures is True:
            self.correction = FitCorrection(run, pipeline, correction, self.activations)
        self.quantized = QuantizedNetwork(run.sampling, self.activations, self.correction)
        self.reference = ComputeReference(run, pipeline)
        float_sampler = run.sampling.predictor(run.denoiser.unet), run.sampling
        self.float_images = SampleImages(run, pipeline, SampledNetwork("float ", None, lambda: float_sampler))
        self.float_scores = ScoreImages(run, pipeline, self.float_images, self.reference)
        self.simulated = self._evaluation(SampledNetwork("", self.quantized.stage, self.quantized.sampler))
        self.export = ExportEngine(run, pipeline, engine, self.quantized) if engine else None
        self.deployed: Evaluation | None = None
        if self.export:
            self.deployed = self._evaluation(SampledNetwork(f"{self.export.name} ", self.export, self.export.sampler))
        given = run, pipeline, self.quantized
        cheap_first = (WeightRounding, TemporalFeatures, ErrorAccumulation, ActivationRanges)
        diagnoses = [*(kind(*given) for kind in cheap_first), UnitSensitivity(*given, self.trajectory)]
        self.diagnoses: dict[str, Diagnosis] = {stage.name: stage for stage in diagnoses}

    def _evaluation(self, network: SampledNetwork) -> Evaluation:
        given = self.run, self.pipeline
        images, errors = SampleImages(*given, network), MeasureErrors(*given, network, self.quantized)
        return Evaluation(images, ScoreImages(*given, images, self.reference), errors)

    def data(self, goal: str) -> list[Stage]:
        """Stages with the data that weights (`goal` is weights) or the whole network are made from."""
        found: list[Stage] = []
        if self.run.follows_trajectories and not (goal == "weights" and self.examples):
            found.append(self.trajectory)
        return [*found, self.examples] if self.examples else found

    def stages(self, goals: Collection[str]) -> list[Stage]:
        """Stages that lead to the last of the goals, in order; `goals` are `goals_up_to` it."""
        *_, goal = goals
        stages: dict[str, Sequence[Stage | None]] = {
            "trajectory": [self.trajectory] if goal in ("trajectory", "diagnose") else [],
            "weights": [*self.data(goal), self.weights],
            "activations": [self.activations],
            "correction": [self.correction],
            "images": [self.float_images, self.simulated.images],
            "scores": [self.reference, self.float_scores, self.simulated.scores, self.simulated.errors],
            "diagnose": [*self.diagnoses.values()],
        }
        found = [stage for name in stages if name in goals for stage in stages[name] if stage]
        if self.export and self.deployed:
            sampled = [self.deployed.images] if "images" in goals else []
            scored = [self.deployed.scores, self.deployed.errors] if "scores" in goals else []
            found += [self.export, *sampled, *scored]
        return list(dict.fromkeys(found))

    def missing(self, goals: Collection[str]) -> dict[str, int | None]:
        """Stages that the store does not have, with their amount of work as `Stage.count` has it."""
        return {stage.name: stage.count() for stage in self.stages(goals) if not stage.entry.done}

    def make_network(self, goal: str) -> None:
        """Compute what a goal needs of the network, and have the data behind it in the store, even if that was deleted."""
        if goal == "trajectory":
            self.pipeline.get(self.trajectory)
            return
        self.pipeline.get(self.weights if goal == "weights" else self.activations)
        for stage in (self.weights, *self.data(goal)):
            self.pipeline.require(stage)

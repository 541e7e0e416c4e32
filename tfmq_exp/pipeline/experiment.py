"""All stages of a run, each connected with those whose results it reads."""

from collections.abc import Collection
from typing import NamedTuple

from tfmq_exp.deploy.engine import Engine
from tfmq_exp.pipeline.networks import FloatNetwork, QuantizedNetwork, SampledNetwork
from tfmq_exp.pipeline.pipeline import Pipeline, Stage
from tfmq_exp.pipeline.run import Run
from tfmq_exp.pipeline.stages.calibrate_activations import CalibrateActivations
from tfmq_exp.pipeline.stages.collect_trajectory import CollectTrajectory
from tfmq_exp.pipeline.stages.diagnose import (
    ActivationRanges,
    ErrorAccumulation,
    TemporalFeatures,
    UnitSensitivity,
    WeightRounding,
)
from tfmq_exp.pipeline.stages.encode_examples import EncodeExamples
from tfmq_exp.pipeline.stages.export_engine import DeployedNetwork, ExportEngine
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


class Diagnoses(NamedTuple):
    """Diagnoses of the quantized network, the cheap ones first."""

    rounding: WeightRounding
    features: TemporalFeatures
    accumulation: ErrorAccumulation
    ranges: ActivationRanges
    sensitivity: UnitSensitivity


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
            self.examples = EncodeExamples(run, pipeline, weights)
            self.weights = TrainWeights(run, pipeline, weights, self.examples)
        else:
            self.weights = ReconstructWeights(run, pipeline, weights, self.trajectory)
        self.activations = CalibrateActivations(run, pipeline, self.trajectory, self.weights)
        self.correction: FitCorrection | None = None
        if (correction := run.method.correction).measures is True:
            self.correction = FitCorrection(run, pipeline, correction, self.activations)
        self.quantized = QuantizedNetwork(run, self.activations, self.correction)
        self.reference = ComputeReference(run, pipeline)
        self.float_images = SampleImages(run, pipeline, FloatNetwork(run))
        self.float_scores = ScoreImages(run, pipeline, self.float_images, self.reference)
        self.simulated = self._evaluation(self.quantized)
        self.export, self.deployed = None, None
        if engine is not None:
            self.export = ExportEngine(run, pipeline, engine, self.quantized)
            self.deployed = self._evaluation(DeployedNetwork(self.export))
        given = run, pipeline, self.quantized
        self.diagnoses = Diagnoses(
            WeightRounding(*given),
            TemporalFeatures(*given),
            ErrorAccumulation(*given),
            ActivationRanges(*given),
            UnitSensitivity(*given, self.trajectory),
        )

    def _evaluation(self, network: SampledNetwork) -> Evaluation:
        images = SampleImages(self.run, self.pipeline, network)
        scores = ScoreImages(self.run, self.pipeline, images, self.reference)
        return Evaluation(images, scores, MeasureErrors(self.run, self.pipeline, network, self.quantized))

    def data(self, goal: str) -> list[Stage]:
        """Stages with the data that weights (`goal` is weights) or the whole network are made from."""
        found: list[Stage] = []
        if self.run.follows_trajectories and not (goal == "weights" and self.examples):
            found.append(self.trajectory)
        return [*found, self.examples] if self.examples else found

    def stages(self, goals: Collection[str]) -> list[Stage]:
        """Stages that lead to the last of the goals, in order; `goals` are those on the way, as `on_the_way` has them."""
        *_, goal = goals
        stages: dict[str, list[Stage]] = {
            "trajectory": [self.trajectory] if goal in ("trajectory", "diagnose") else [],
            "weights": [*self.data(goal), self.weights],
            "activations": [self.activations],
            "correction": [self.correction] if self.correction else [],
            "images": [self.float_images, self.simulated.images],
            "scores": [self.reference, self.float_scores, self.simulated.scores, self.simulated.errors],
            "diagnose": [*self.diagnoses],
        }
        if self.export and self.deployed:
            engine = {"images": [self.deployed.images], "scores": [self.deployed.scores, self.deployed.errors]}
            last = [stage for name in ("images", "scores") if name in goals for stage in engine[name]]
            stages["engine"] = [self.export, *last]
        found = [stage for name, some in stages.items() if name in goals or name == "engine" for stage in some]
        return list(dict.fromkeys(found))

    def make_network(self, goal: str) -> None:
        """Compute what a goal needs of the network, and have the data behind it in the store, even if that was deleted."""
        if goal == "trajectory":
            self.pipeline.get(self.trajectory)
            return
        self.pipeline.get(self.weights if goal == "weights" else self.activations)
        for stage in (self.weights, *self.data(goal)):
            self.pipeline.require(stage)

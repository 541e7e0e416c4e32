"""All stages of a run, each connected with those whose results it reads."""

from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

import torch

from tfmq_exp.deploy.engine import Engine
from tfmq_exp.pipeline.pipeline import Pipeline, Stage
from tfmq_exp.pipeline.run_config import Run
from tfmq_exp.pipeline.stages import diagnose, evaluation
from tfmq_exp.pipeline.stages.activations import CalibrateActivations, FitCorrection, QuantizationResult
from tfmq_exp.pipeline.stages.components import (
    CollectLatents,
    QuantizedComponents,
    QuantizeFirstStage,
    QuantizeTextEncoders,
)
from tfmq_exp.pipeline.stages.data import CollectTrajectory, EncodeExamples
from tfmq_exp.pipeline.stages.export_engine import ExportEngine
from tfmq_exp.pipeline.stages.image_comparison import CompareImages
from tfmq_exp.pipeline.stages.weights import ReconstructWeights, TrainWeights


class Evaluation(NamedTuple):
    """Stages that evaluate one quantized network."""

    images: evaluation.SampleImages
    scores: evaluation.ScoreImages
    errors: evaluation.MeasureErrors
    comparison: CompareImages  # with the float network's images


class Experiment:
    """The stages of a run. An engine executes the finished network as well, and is evaluated like the simulation."""

    def __init__(self, run: Run, pipeline: Pipeline, engine: Engine | None = None) -> None:
        self.run, self.pipeline = run, pipeline
        given = run, pipeline
        self.trajectory = CollectTrajectory(*given)
        self.examples: EncodeExamples | None = None
        weights, correction = run.method.weights, run.method.correction
        if weights.trains is True:
            self.examples = EncodeExamples(*given, weights.protocol.horizontal_flip)
            self.weights = TrainWeights(*given, weights, self.examples)
        else:
            self.weights = ReconstructWeights(*given, weights, self.trajectory)
        self.activations = CalibrateActivations(*given, self.trajectory, self.weights)
        self.correction = FitCorrection(*given, correction, self.activations) if correction.measures is True else None
        self.latents = CollectLatents(*given, self.trajectory)
        first_stage = QuantizeFirstStage(*given, run.first_stage, self.latents) if run.first_stage else None
        text_encoders = QuantizeTextEncoders(*given, run.text_encoder) if run.text_encoder else None
        self.components = QuantizedComponents(run, first_stage, text_encoders)
        self.quantized = QuantizationResult(run.sampling, self.activations, self.correction)
        self.reference = evaluation.ComputeReference(*given)
        float_sampler = run.sampling.predictor(run.denoiser.call), run.sampling
        float_network = evaluation.SampledNetwork(None, lambda: float_sampler)
        self.float_images = evaluation.SampleImages(*given, float_network, prefix="float ")
        self.float_scores = evaluation.ScoreImages(*given, self.float_images, self.reference, prefix="float ")
        self.floor = {kind: self._floor(kind) for kind in run.floor.floor}
        self.simulated = self._evaluation("", self.quantized.stage, self.quantized.sampler)
        self.export = export = ExportEngine(*given, engine, self.quantized) if engine else None
        self.deployed = self._evaluation(f"{export.name} ", export, export.sampler) if export else None
        diagnosed = *given, self.quantized, self.trajectory
        self.similarity = diagnose.FeatureSimilarity(*diagnosed)
        first = diagnose.WeightRounding, diagnose.TemporalFeatures, diagnose.ErrorAccumulation  # the cheap ones
        last = diagnose.ActivationRanges, diagnose.UnitSensitivity
        diagnoses = *(kind(*diagnosed) for kind in first), self.similarity, *(kind(*diagnosed) for kind in last)
        self.diagnoses: dict[str, diagnose.Diagnosis] = {stage.name: stage for stage in diagnoses}

    def _evaluation(self, prefix: str, *sampled_as: Any) -> Evaluation:
        given, sampled = (self.run, self.pipeline), evaluation.SampledNetwork(*sampled_as)
        images = evaluation.SampleImages(*given, sampled._replace(components=self.components), prefix=prefix)
        scores = evaluation.ScoreImages(*given, images, self.reference, prefix=prefix)
        errors = evaluation.MeasureErrors(*given, sampled, self.quantized, prefix=prefix)
        return Evaluation(images, scores, errors, CompareImages(*given, images, self.float_images, prefix=prefix))

    def _floor(self, kind: str) -> CompareImages:
        """Comparison of float images with such as are made otherwise in one respect."""
        other, prefix = self.run.made_otherwise(kind), f"float {kind} "
        network = evaluation.SampledNetwork(
            None, lambda: (other.sampling.predictor(other.denoiser.network), other.sampling)
        )
        if kind == "threads":
            threads = 1 if torch.get_num_threads() > 1 else 2
            images = evaluation.SampleWithThreads(other, self.pipeline, network, threads, prefix=prefix)
        else:
            images = evaluation.SampleImages(other, self.pipeline, network, prefix=prefix)
        return CompareImages(self.run, self.pipeline, images, self.float_images, prefix=prefix)

    def data(self, goal: str) -> list[Stage]:
        """Stages with the data that weights (`goal` is weights) or the whole network are made from."""
        found: list[Stage] = []
        if self.run.follows_trajectories and not (goal == "weights" and self.examples):
            found.append(self.trajectory)
        return [*found, self.examples] if self.examples else found

    def component_stages(self) -> list[Stage]:
        """Stages of quantized components, after the latents that a first stage learns from."""
        stages = self.components.stages
        return [*([self.latents] if "first_stage" in stages else []), *stages.values()]

    def stages(self, goals: Collection[str]) -> list[Stage]:
        """Stages that lead to the last of the goals, in order; `goals` are `goals_up_to` it."""
        *_, goal = goals
        floor = [stage for each in self.floor.values() for stage in (each.images, each)]
        stages: dict[str, Sequence[Stage | None]] = {
            "trajectory": [self.trajectory] if goal in ("trajectory", "diagnose") else [],
            "weights": [*self.data(goal), self.weights],
            "activations": [self.activations, *self.component_stages()],
            "correction": [self.correction],
            "images": [self.float_images, self.simulated.images],
            "compare": [self.simulated.comparison, *floor],
            "scores": [self.reference, self.float_scores, *self.simulated[1:], *floor],
            "diagnose": [*self.diagnoses.values()],
        }
        found = [stage for name in stages if name in goals for stage in stages[name] if stage]
        if self.export and self.deployed:
            sampled = [self.deployed.images] if "images" in goals else []
            compared = [self.deployed.comparison] if "compare" in goals else []
            scored = [*self.deployed[1:]] if "scores" in goals else []
            found += [self.export, *sampled, *compared, *scored]
        return list(dict.fromkeys(found))

    def check_memory(self, goals: Collection[str]) -> None:
        """ValueError, with their names, for stages that need a network in memory where its weights stay in their files."""
        whole = [stage.name for stage in self.stages(goals) if not stage.in_parts]
        if self.run.denoiser.shards and whole:
            raise ValueError(
                f"runtime.weights=stored: with method={self.run.method.name} these stages need the network in memory: "
                f"{', '.join(whole)}; methods that learn block by block, as brecq and tfmq, do not"
            )

    def missing(self, goals: Collection[str]) -> dict[str, int | None]:
        """Stages that the store does not have, with their amount of work as `Stage.count` has it."""
        return {stage.name: stage.count() for stage in self.stages(goals) if not stage.entry.done}

    def make_network(self, goal: str) -> None:
        """Compute what a goal needs of the network, and have the data behind it in the store, even if that was deleted."""
        last: dict[str, Stage] = {"trajectory": self.trajectory, "weights": self.weights}
        self.pipeline.get(last.get(goal, self.activations))
        for stage in () if goal in last else self.components.stages.values():
            self.pipeline.get(stage)
        for stage in () if goal == "trajectory" else (self.weights, *self.data(goal)):
            self.pipeline.require(stage)

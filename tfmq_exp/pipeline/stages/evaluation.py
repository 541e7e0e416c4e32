"""Evaluation of one network: its images, their scores, and its errors against the float one."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tfmq_exp.core.files import write_atomically, write_json
from tfmq_exp.core.finite import within
from tfmq_exp.core.seeds import Stream
from tfmq_exp.diagnostics.temporal_error import temporal_feature_error
from tfmq_exp.diagnostics.trajectory_error import TrajectoryPair
from tfmq_exp.evaluation.references import ReferenceStatistics, reference_statistics
from tfmq_exp.evaluation.scores import Scores
from tfmq_exp.pipeline.pipeline import Advance, Stage
from tfmq_exp.pipeline.stages.activations import QuantizationResult
from tfmq_exp.pipeline.stages.components import QuantizedComponents
from tfmq_exp.sampling.guidance import Sampling
from tfmq_exp.sampling.images import sample_shard
from tfmq_exp.sampling.trajectory import Predict

STATISTICS, SCORES, ERRORS = "statistics.safetensors", "scores.json", "errors.json"
IMAGE_SCORES = "image_scores.safetensors"


class SampledNetwork(NamedTuple):
    """A network as images are sampled with it."""

    stage: Stage | None  # that makes it; None for the float network
    sampler: Callable[[], tuple[Predict, Sampling]]  # gives the prediction of the noise, and its sampling
    components: QuantizedComponents | None = None  # its first stage and text encoders; None for the float ones

    @property
    def inputs(self) -> dict[str, Any]:
        """Identity of the network beyond that of the float model, as a part of keys."""
        components = self.components.inputs if self.components else {}
        return {**components, "network": self.stage.key} if self.stage else {}


@dataclass(eq=False)
class SampleImages(Stage):
    """Images, a file for each batch. They depend on the network, the sampler, count and seed, and (in the last bit) the batch."""

    network: SampledNetwork
    stored_as = "images"
    in_parts = True

    def inputs(self) -> Mapping[str, Any]:
        return {**self.run.model_inputs, **self.network.inputs, "images": self.run.images}

    def compute(self, folder: Path) -> None:
        run, calls, (predict, sampling) = self.run, len(self.run.calls), self.network.sampler()
        denoiser = self.network.components.denoiser if self.network.components else run.denoiser

        def make(shard: range, advance: Advance) -> Callable[[Path], object]:
            def each_step(step: int) -> None:
                advance((step + 1) / calls, f"step {step + 1}")

            with within(f"{self.name} {shard.start} to {shard.stop - 1}"):
                images = sample_shard(predict, denoiser, sampling, run.images, shard, each_step)
            return partial(save_file, {"images": images})

        with self.pipeline.progress(self.name, 1) as advance:
            self.pipeline.compute_files(self.shards_in(folder), make, advance)

    def count(self) -> int:
        return sum(len(shard) for shard, file in self.shards_in(self.entry.path).items() if not file.is_file())

    def shards_in(self, folder: Path) -> dict[range, Path]:
        """Files in a folder by the indices of their images."""
        return {shard: folder / f"images-{shard.start:06d}.safetensors" for shard in self.run.images.shards()}

    def images(self) -> Iterator[Tensor]:
        """The images, shard by shard, uint8."""
        for file in self.shards_in(self.result()).values():
            yield load_file(file)["images"]


@dataclass(eq=False)
class SampleWithThreads(SampleImages):
    """Images with another number of threads, which adds in another order."""

    threads: int = 1

    def inputs(self) -> Mapping[str, Any]:
        return {**super().inputs(), "threads": self.threads}

    def compute(self, folder: Path) -> None:
        before = torch.get_num_threads()
        torch.set_num_threads(self.threads)
        try:
            super().compute(folder)
        finally:
            torch.set_num_threads(before)


class ComputeReference(Stage):
    """Statistics of the reference; they depend on it, the extractor, and how many features are kept."""

    stored_as = "reference"
    in_parts = True

    def inputs(self) -> Mapping[str, Any]:
        evaluator = self.run.evaluator
        features = {"extractor": evaluator.extract.identity, "features_kept": evaluator.kept}
        return {"reference": evaluator.reference.identity, **features}

    def compute(self, folder: Path) -> None:
        given = self.run.evaluator.reference, self.run.evaluator.extract, self.run.evaluator.kept
        with self.pipeline.progress(self.name, 1) as advance:
            statistics = reference_statistics(*given, lambda done, of: advance(done / of, f"{done} of {of}"))
        self.pipeline.store.write(folder / STATISTICS, statistics.save)

    @cached_property
    def statistics(self) -> ReferenceStatistics:
        """Moments, and features of single images where a metric needs them."""
        return ReferenceStatistics.load(self.result() / STATISTICS)

    def check_size(self) -> None:
        """Compare the size of the reference's images with that of the generated ones; ValueError for another."""
        denoiser, reference, shape = self.run.denoiser, self.statistics, self.run.denoiser.image_shape()
        if reference.shape not in (None, shape):
            raise ValueError(
                f"{denoiser.name} makes images {shape}, the reference {reference.title} has {reference.shape}"
            )

    def evaluator_record(self) -> dict[str, Any]:
        """Identity of the evaluator and origin of its reference, for the record of a run."""
        reference = {"reference": self.statistics.title, "reference_provenance": self.statistics.provenance}
        return {**self.run.evaluator.identity, **reference}


@dataclass(eq=False)
class ScoreImages(Stage):
    """Scores of one network's images."""

    images: SampleImages
    reference: ComputeReference
    stored_as = "scores"
    in_parts = True

    def inputs(self) -> Mapping[str, Any]:
        evaluator = self.run.evaluator.identity
        return {"images": self.images.key, "evaluator": evaluator, "reference": self.reference.key}

    def compute(self, folder: Path) -> None:
        run, group = self.run, self.pipeline.group
        scores = Scores(run.evaluator, self.reference.statistics)
        for shard, file in group.shard([*self.images.shards_in(self.images.result()).items()]):
            captions = run.sampling.conditioning.choose(run.images.seed, Stream.IMAGES, shard)
            scores.update(load_file(file)["images"], shard.start, captions)
        parts = [folder / f"part-{rank}.safetensors" for rank in range(1, group.world_size)]
        if not group.is_main:
            write_atomically(parts[group.rank - 1], partial(save_file, scores.tensors()))
        group.barrier()
        if group.is_main:
            for part in parts:
                scores.merge(load_file(part))
            for part in folder.glob("part-*"):  # those of an attempt with more processes as well
                part.unlink()
            write_json(folder / SCORES, scores.compute())
            if run.evaluator.image_scores:
                write_atomically(folder / IMAGE_SCORES, partial(save_file, scores.image_rows()))

    def image_scores(self) -> dict[str, Tensor]:
        """Scores of every image by name, in the order of the images; empty without such scores."""
        return load_file(self.result() / IMAGE_SCORES) if self.run.evaluator.image_scores else {}

    def scores(self) -> dict[str, float]:
        """Score by metric."""
        return self.read_json(SCORES)


@dataclass(eq=False)
class MeasureErrors(Stage):
    """Error curves: of the trajectory of `network`, and of the temporal features of the quantized network behind it."""

    network: SampledNetwork
    quantized: QuantizationResult
    stored_as = "diagnostics"
    in_parts = True

    def inputs(self) -> Mapping[str, Any]:
        run = self.run
        return {**run.model_inputs, **self.network.inputs, "diagnostics": run.diagnostics, "seed": run.seed}

    def compute(self, folder: Path) -> None:
        run = self.run
        pair = TrajectoryPair(*self.network.sampler(), run.denoiser, run.sampling, run.seed)
        networks = self.quantized.model, run.denoiser.network, run.structure
        timesteps = run.sampling.finite_set(run.denoiser)
        with run.denoiser.loading(), self.quantized.activations.loading():
            with self.pipeline.progress(self.name, len(run.calls)) as advance:
                along = pair.error(run.diagnostics, lambda step: advance(step + 1, ""))
            temporal = temporal_feature_error(*networks, timesteps, run.temporal_conditions)
        self.pipeline.store.write_json(folder / ERRORS, {"temporal": temporal, "trajectory": along})

    def count(self) -> int:
        return self.run.diagnostics

    def errors(self) -> dict[str, list[dict[str, Any]]]:
        """`temporal`: a row for each timestep; `trajectory`: a row for each step."""
        return self.read_json(ERRORS)

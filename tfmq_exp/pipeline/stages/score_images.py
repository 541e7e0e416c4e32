"""Statistics of the reference images, and scores of generated images against them."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from tfmq_exp.core.files import write_atomically, write_json
from tfmq_exp.core.seeds import Stream
from tfmq_exp.evaluation.references import ReferenceStatistics, reference_statistics
from tfmq_exp.evaluation.scores import Scores
from tfmq_exp.pipeline.pipeline import Stage
from tfmq_exp.pipeline.stages.sample_images import SampleImages

STATISTICS, SCORES = "statistics.safetensors", "scores.json"


class ComputeReference(Stage):
    """Statistics of the reference; they depend on it, the extractor, and how many features are kept."""

    stored_as = "reference"

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
        """Compare the size of the reference's images with that of the generated ones.

        Raises:
            ValueError: another size.
        """
        denoiser, reference = self.run.denoiser, self.statistics
        shape = denoiser.image_shape()
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

    @property
    def name(self) -> str:
        return f"{self.images.network.prefix}scores"

    def inputs(self) -> Mapping[str, Any]:
        evaluator = self.run.evaluator.identity
        return {"images": self.images.key, "evaluator": evaluator, "reference": self.reference.key}

    def compute(self, folder: Path) -> None:
        run, group = self.run, self.pipeline.group
        scores = Scores(run.evaluator, self.reference.statistics)
        for shard, file in group.shard([*self.images.shards().items()]):
            captions = run.sampling.conditioning.choose(run.images.seed, Stream.IMAGES, shard)
            scores.update(load_file(file)["images"], shard.start, captions)
        parts = [folder / f"part-{rank}.safetensors" for rank in range(1, group.world_size)]
        if not group.is_main:
            write_atomically(parts[group.rank - 1], lambda path: save_file(scores.tensors(), path))
        group.barrier()
        if group.is_main:
            for part in parts:
                scores.merge(load_file(part))
            for part in folder.glob("part-*"):  # those of an attempt with more processes as well
                part.unlink()
            write_json(folder / SCORES, scores.compute())

    def scores(self) -> dict[str, float]:
        """Score by metric."""
        return self.read_json(SCORES)

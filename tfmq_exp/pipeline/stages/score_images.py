"""Statistics of the reference images, and scores of generated images against them."""

import json
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from tfmq_exp.evaluation.references import ReferenceStatistics, reference_statistics
from tfmq_exp.evaluation.scores import Scores
from tfmq_exp.files import write_atomically, write_json
from tfmq_exp.pipeline.pipeline import Pipeline, Stage
from tfmq_exp.pipeline.run import Run
from tfmq_exp.pipeline.stages.sample_images import SampleImages
from tfmq_exp.sampling.images import STREAM


class ComputeReference(Stage):
    """Statistics of the reference; they depend on it, the extractor, and how many features are kept."""

    name = stored_as = "reference"

    @property
    def inputs(self) -> Mapping[str, Any]:
        evaluator = self.run.evaluator
        features = {"extractor": evaluator.extract.identity, "features_kept": evaluator.kept}
        return {"reference": evaluator.reference.identity, **features}

    def compute(self, folder: Path) -> None:
        evaluator = self.run.evaluator
        given = evaluator.reference, evaluator.extract, evaluator.kept
        with self.pipeline.progress.stage(self.name, 1) as advance:
            statistics = reference_statistics(*given, lambda done, of: advance(done / of, f"{done} of {of}"))
        self.pipeline.store.write(folder / "statistics.safetensors", statistics.save)

    @cached_property
    def statistics(self) -> ReferenceStatistics:
        """Moments, and features of single images where a metric needs them."""
        return ReferenceStatistics.load(self.result() / "statistics.safetensors")

    def check_size(self) -> None:
        """Compare the reference's images with the generated ones.

        Raises:
            ValueError: images of another size.
        """
        denoiser, reference = self.run.denoiser, self.statistics
        blank = torch.zeros(1, *denoiser.sample_shape, device=denoiser.device)
        shape = tuple(denoiser.first_stage.decode(blank).shape[1:])
        if reference.shape not in (None, shape):
            raise ValueError(
                f"{denoiser.name} makes images {shape}, the reference {reference.title} has {reference.shape}"
            )

    def evaluator_record(self) -> dict[str, Any]:
        """Identity of the evaluator and origin of its reference, for the record of a run."""
        reference = {"reference": self.statistics.title, "reference_provenance": self.statistics.provenance}
        return {**self.run.evaluator.identity, **reference}


class ScoreImages(Stage):
    """Scores of one network's images."""

    stored_as = "scores"

    def __init__(self, run: Run, pipeline: Pipeline, images: SampleImages, reference: ComputeReference) -> None:
        super().__init__(run, pipeline)
        self.images, self.reference, self.name = images, reference, f"{images.network.prefix}scores"

    @property
    def inputs(self) -> Mapping[str, Any]:
        evaluator = self.run.evaluator.identity
        return {"images": self.images.key, "evaluator": evaluator, "reference": self.reference.key}

    def compute(self, folder: Path) -> None:
        run, group = self.run, self.pipeline.group
        scores = Scores(run.evaluator, self.reference.statistics)
        for shard, file in group.shard([*self.images.shards().items()]):
            captions = run.sampling.conditioning.choose(run.images.seed, STREAM, shard)
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
            write_json(folder / "scores.json", scores.compute())

    def scores(self) -> dict[str, float]:
        """Score by metric."""
        return json.loads((self.result() / "scores.json").read_text(encoding="utf-8"))

"""From the finished method to images, scores and diagnostics, pulled through the store."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tfmq_exp.calibration.collect import STREAM as CALIBRATION
from tfmq_exp.core.files import intact, write_atomically, write_checked, write_json
from tfmq_exp.core.finite import within
from tfmq_exp.core.validate import COUNT, check_fields
from tfmq_exp.denoisers.loading.text_encoder import TextEncoder
from tfmq_exp.diagnostics.temporal_error import temporal_feature_error
from tfmq_exp.diagnostics.trajectory_error import trajectory_error
from tfmq_exp.evaluation.evaluator import Evaluator
from tfmq_exp.evaluation.references import ReferenceStatistics, reference_statistics
from tfmq_exp.evaluation.scores import Scores
from tfmq_exp.pipeline.network_stages import NetworkStages
from tfmq_exp.pipeline.store import Entry
from tfmq_exp.sampling.images import STREAM, ImagePlan, sample_shard


@dataclass(frozen=True)
class DiagnosticPlan:
    """How many trajectories are compared, float against quantized."""

    images: int

    def __post_init__(self) -> None:
        check_fields(self, images=COUNT)


@dataclass(frozen=True)
class DiagnosisPlan:
    """How much a diagnosis looks at.

    Args:
        samples: of the calibration set, spread over its sampling steps: every unit's sensitivity is measured on them.
        trajectories: whose activations and errors are followed.
        sensitivity: quantize each unit `alone`, or all the `others` and leave it float.
    """

    samples: int
    trajectories: int
    sensitivity: Literal["alone", "others"]

    def __post_init__(self) -> None:
        check_fields(self, samples=COUNT, trajectories=COUNT)
        if self.sensitivity not in ("alone", "others"):
            raise ValueError(f"diagnosis.sensitivity must be alone or others, got {self.sensitivity!r}")


@dataclass
class Stages(NetworkStages):
    """Everything that a run is made of, and the stages that turn it into scores."""

    evaluator: Callable[[], Evaluator] = field(kw_only=True)
    images: ImagePlan = field(kw_only=True)
    diagnostics: DiagnosticPlan = field(kw_only=True)
    diagnosis: DiagnosisPlan = field(kw_only=True)

    @cached_property
    def captions(self) -> Mapping[str, int]:
        """Of all images of the run and of its calibration: how many are cut, as `TextEncoder.count_cut` has it."""
        encoder = self.denoiser.encoder
        if not isinstance(encoder, TextEncoder):
            return {}
        chosen = [
            *self.sampling.conditioning.choose(self.images.seed, STREAM, range(self.images.count)),
            *self.sampling.conditioning.choose(self.seed, CALIBRATION, range(self.calibration.images)),
        ]
        return encoder.count_cut(chosen)

    @cached_property
    def judge(self) -> Evaluator:
        """Who judges the images; made once, and with it its network."""
        return self.evaluator()

    def images_entry(self, *, quantized: bool) -> Entry:
        """Images: depend on the network that makes them, the sampler, count and seed, and (in the last bit) the batch."""
        network = {"network": self.finished.key} if quantized else {}
        return self.store.entry("images", {**self.model_inputs, **network, "images": self.images})

    def image_files(self, *, quantized: bool) -> dict[range, Path]:
        """Images by their indices: a shard is a file; missing ones are made."""
        name = "images" if quantized else "float images"

        def compute(folder: Path) -> None:
            float_pair = self.sampling.predictor(self.denoiser.unet), self.sampling
            predict, sampling = self.corrected if quantized else float_pair
            with self.bars.stage(name, self.images.count) as advance:
                for shard in self.processes.shard(self.images.shards()):
                    target = image_file(folder, shard)
                    if not intact(target):
                        with within(f"{name} {shard.start} to {shard.stop - 1}"):
                            images = sample_shard(
                                predict,
                                self.denoiser,
                                sampling,
                                self.images,
                                shard,
                                lambda step, shard=shard: advance(
                                    shard.start + len(shard) * (step + 1) / len(self.calls), f"step {step + 1}"
                                ),
                            )
                        write_checked(target, lambda path, images=images: save_file({"images": images}, path))
                    advance(shard.stop, "")

        path = self.pull(name, self.images_entry(quantized=quantized), compute)
        return {shard: image_file(path, shard) for shard in self.images.shards()}

    def sampled(self, *, quantized: bool) -> Iterator[Tensor]:
        """The images, shard by shard, uint8."""
        for file in self.image_files(quantized=quantized).values():
            yield load_file(file)["images"]

    def reference(self, evaluator: Evaluator) -> tuple[Entry, ReferenceStatistics]:
        """What images are compared with: depends on the reference, the extractor, and how many features are kept."""
        source, extract, keep = evaluator.reference, evaluator.extract, evaluator.kept
        inputs = {"reference": source.identity, "extractor": extract.identity, "features_kept": keep}
        entry = self.store.entry("reference", inputs)

        def compute(folder: Path) -> None:
            with self.bars.stage("reference", 1) as advance:
                statistics = reference_statistics(
                    source, extract, keep, lambda done, of: advance(done / of, f"{done} of {of}")
                )
            self.store.write(folder / "statistics.safetensors", statistics.save)

        return entry, ReferenceStatistics.load(self.pull("reference", entry, compute) / "statistics.safetensors")

    def check_reference(self) -> None:
        """Have the reference's statistics in the store, and know that they are of images like the generated ones.

        Raises:
            ValueError: images of another size.
        """
        _, reference = self.reference(self.judge)
        blank = torch.zeros(1, *self.denoiser.sample_shape, device=self.denoiser.device)
        shape = tuple(self.denoiser.first_stage.decode(blank).shape[1:])
        if reference.shape not in (None, shape):
            raise ValueError(
                f"{self.denoiser.name} makes images {shape}, the reference {reference.title} has {reference.shape}"
            )

    def scores(self, *, quantized: bool) -> tuple[dict[str, float], dict[str, Any]]:
        """Scores of the images, and who says so against which reference."""
        evaluator = self.judge
        entry, reference = self.reference(evaluator)
        images = self.images_entry(quantized=quantized)
        inputs = {"images": images.key, "evaluator": evaluator.identity, "reference": entry.key}

        def captions(indices: range) -> Sequence[Any]:
            return self.sampling.conditioning.choose(self.images.seed, STREAM, indices)

        def compute(folder: Path) -> None:
            scores, processes = Scores(evaluator, reference), self.processes
            for shard, file in processes.shard([*self.image_files(quantized=quantized).items()]):
                scores.update(load_file(file)["images"], shard.start, captions(shard))
            parts = [folder / f"part-{rank}.safetensors" for rank in range(1, processes.world_size)]
            if not processes.is_main:
                write_atomically(parts[processes.rank - 1], lambda path: save_file(scores.tensors(), path))
            processes.barrier()
            if processes.is_main:
                for part in parts:
                    scores.merge(load_file(part))
                for part in folder.glob("part-*"):  # those of an attempt with more processes as well
                    part.unlink()
                write_json(folder / "scores.json", scores.compute())

        name = "scores" if quantized else "float scores"
        path = self.pull(name, self.store.entry("scores", inputs), compute)
        judge = {**evaluator.identity, "reference": reference.title, "reference_provenance": reference.provenance}
        return json.loads((path / "scores.json").read_text(encoding="utf-8")), judge

    def errors(self) -> dict[str, list[dict[str, Any]]]:
        """Temporal-feature error per timestep and error along the trajectory, against the float network."""
        inputs = {
            **self.model_inputs,
            "network": self.finished.key,
            "diagnostics": self.diagnostics,
            "seed": self.seed,
        }

        def compute(folder: Path) -> None:
            with self.bars.stage("diagnostics", len(self.calls)) as advance:
                along = trajectory_error(
                    *self.corrected,
                    self.denoiser,
                    self.sampling,
                    images=self.diagnostics.images,
                    seed=self.seed,
                    each_step=lambda step: advance(step + 1, ""),
                )
            temporal = temporal_feature_error(self.quantized_model, self.denoiser.unet, self.structure)
            self.store.write_json(folder / "errors.json", {"temporal": temporal, "trajectory": along})

        path = self.pull("diagnostics", self.store.entry("diagnostics", inputs), compute)
        return json.loads((path / "errors.json").read_text(encoding="utf-8"))

    @property
    def artefact(self) -> Path:
        """The file that holds the quantized model."""
        return self.activations.path / "quantized.safetensors"

    @property
    def float_bytes(self) -> int:
        """Size of the float network in float32."""
        return 4 * sum(p.numel() for p in self.denoiser.unet.parameters())


def image_file(folder: Path, shard: range) -> Path:
    """Where the images of a shard are."""
    return folder / f"images-{shard.start:06d}.safetensors"

"""From the finished method to images, scores and diagnostics, pulled through the store."""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from tfmq_exp.evaluation.features import Evaluator
from tfmq_exp.evaluation.scores import score
from tfmq_exp.evaluation.temporal import temporal_feature_error, trajectory_error
from tfmq_exp.experiment.network_stages import NetworkStages
from tfmq_exp.experiment.store import Entry, write_atomically, write_json
from tfmq_exp.sampling.images import ImagePlan, sample_shard
from tfmq_exp.sampling.sampler import noise_predictor


@dataclass(frozen=True)
class DiagnosticPlan:
    """How many trajectories are compared, float against quantized."""

    images: int


@dataclass
class Stages(NetworkStages):
    """Everything that a run is made of, and the stages that turn it into scores."""

    evaluator: Callable[[], Evaluator] = field(kw_only=True)
    images: ImagePlan = field(kw_only=True)
    diagnostics: DiagnosticPlan = field(kw_only=True)

    def images_entry(self, *, quantized: bool) -> Entry:
        """Images: depend on the network that makes them, the sampler, count and seed, and (in the last bit) the batch."""
        network = {"network": self.finished.key} if quantized else {}
        return self.store.entry("images", {**self.model_inputs, **network, "images": self.images})

    def sampled(self, *, quantized: bool) -> Iterator[Tensor]:
        """Images in shards, uint8. A shard is a file; missing ones are made."""
        name = "images" if quantized else "float images"

        def compute(folder: Path) -> None:
            float_pair = noise_predictor(self.denoiser.unet), self.sampler
            predict, sampler = self.corrected if quantized else float_pair
            with self.bars.stage(name, self.images.count) as advance:
                for shard in self.images.shards():
                    target = folder / f"images-{shard.start:06d}.safetensors"
                    if not target.is_file():
                        images = sample_shard(
                            predict,
                            self.denoiser,
                            sampler,
                            self.images.seed,
                            shard,
                            lambda step, shard=shard: advance(
                                shard.start + len(shard) * (step + 1) / len(self.calls), f"step {step + 1}"
                            ),
                        )
                        write_atomically(target, lambda path, images=images: save_file({"images": images}, path))
                    advance(shard.stop, "")

        path = self.pull(name, self.images_entry(quantized=quantized), compute)
        for file in sorted(path.glob("images-*.safetensors")):
            yield load_file(file)["images"]

    def scores(self, *, quantized: bool) -> tuple[dict[str, float], dict[str, Any]]:
        """FID, sFID and IS of the images, and who says so."""
        evaluator = self.evaluator()
        identity = {"name": evaluator.name, **evaluator.provenance}
        inputs = {"images": self.images_entry(quantized=quantized).key, "evaluator": identity}

        def compute(folder: Path) -> None:
            write_json(folder / "scores.json", score(evaluator, self.sampled(quantized=quantized)))

        name = "scores" if quantized else "float scores"
        path = self.pull(name, self.store.entry("scores", inputs), compute)
        return json.loads((path / "scores.json").read_text()), identity

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
                    self.sampler,
                    images=self.diagnostics.images,
                    seed=self.seed,
                    each_step=lambda step: advance(step + 1, ""),
                )
            temporal = temporal_feature_error(self.quantized_model, self.denoiser.unet, self.anatomy)
            write_json(folder / "errors.json", {"temporal": temporal, "trajectory": along})

        path = self.pull("diagnostics", self.store.entry("diagnostics", inputs), compute)
        return json.loads((path / "errors.json").read_text())

    @property
    def artefact(self) -> Path:
        """The file that holds the quantized model."""
        return self.activations.path / "quantized.safetensors"

    @property
    def float_bytes(self) -> int:
        """Size of the float network in float32."""
        return 4 * sum(p.numel() for p in self.denoiser.unet.parameters())

"""Integer weights: rounded to nearest or reconstructed unit by unit, or trained with quantizers in the network."""

import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from tfmq_exp.core.files import intact
from tfmq_exp.denoisers.loading.sharded_weights import META
from tfmq_exp.denoisers.pipelines.load import PipelineEncoder
from tfmq_exp.methods.weights import QuantizationAwareTrain, Reconstruct, RoundToNearest
from tfmq_exp.pipeline.pipeline import Stage
from tfmq_exp.pipeline.run_config import Run
from tfmq_exp.pipeline.stages.data import CollectTrajectory, EncodeExamples
from tfmq_exp.pipeline.unit_checkpoints import (
    CheckpointedIntegers,
    finished_units,
    join_results,
    learning,
    load_result,
    save_result,
)
from tfmq_exp.qat.model import finish
from tfmq_exp.qat.train import TrainingContext
from tfmq_exp.qat.training_noise import TrainingNoise
from tfmq_exp.quant.scales.observed_ranges import EMARange, TimestepGroupConfig
from tfmq_exp.reconstruction.blocks.stored_weights import IntegerWeights, LoadedParts, StoredWeights
from tfmq_exp.reconstruction.context import ProgressCallback, ReconstructionContext, UnitCheckpointer, UnitResult
from tfmq_exp.sampling.network_convention import PipelineSampler
from tfmq_exp.surgery.quantized_network import QuantizedNetwork

RECONSTRUCTED, TRAINED = "weights.safetensors", "trained.safetensors"


@dataclass(eq=False)
class ReconstructWeights(Stage):
    """Weights turned into integers; depends on data only where the method learns, on activations only where it learns both."""

    method: RoundToNearest | Reconstruct
    trajectory: CollectTrajectory
    stored_as = "weights"

    def inputs(self) -> Mapping[str, Any]:
        data = {"trajectory": self.trajectory.key, "seed": self.run.seed} if self.method.learns else {}
        joint = self.run.layer_inputs if "activations" in self.method.learns else {}
        return {**self.run.weight_inputs, **data, **joint}

    def compute(self, folder: Path) -> None:
        run, model, data = self.run, self.run.quantized_network(), self.trajectory.samples_if_needed()
        stored = stored_weights(run, folder / "units")
        with learning(self.pipeline, self.name, folder) as callbacks:
            network = model, run.denoiser.network, run.structure
            self.method(ReconstructionContext(*network, data, run.compute, run.seed, *callbacks, stored))
        if stored:
            round_rest(model, stored, folder / "nearest", run.compute.device)
            parts = [*folder.glob("units/*.safetensors"), *folder.glob("nearest/*.safetensors")]
            self.pipeline.store.write(folder / RECONSTRUCTED, partial(join_results, parts))
            shutil.rmtree(folder / "nearest", ignore_errors=True)
            return
        state = model.activation_state() if "activations" in self.method.learns else {}
        save_result(folder / RECONSTRUCTED, UnitResult(model.integers, state), {}, self.pipeline.store.write)

    def count(self) -> int:
        return finished_units(self.entry.path)

    @property
    def in_parts(self) -> bool:
        return self.method.in_parts

    def model(self) -> QuantizedNetwork:
        """The network with integer weights; its activations are still float, or learned if that was done jointly.

        Where weights stay in their files, nothing is loaded.
        """
        if self.run.denoiser.shards:
            self.result()
            return self.run.quantized_network()
        result, _ = load_result(self.result() / RECONSTRUCTED)
        model = self.run.quantized_network()
        for layer, weight in result.integers.items():
            model.freeze(layer, weight)
        model.load_activations(result.activations)
        return model


def stored_weights(run: Run, integers: Path) -> StoredWeights | None:
    """Sources of the weights, integers in the files of a folder; None where the network is in memory."""
    shards = run.denoiser.shards
    return StoredWeights(shards, CheckpointedIntegers(integers)) if shards else None


def round_rest(model: QuantizedNetwork, stored: StoredWeights, folder: Path, device: torch.device) -> None:
    """Round to nearest the weights that no unit has learned, each in a file of its own in the folder."""
    folder.mkdir(exist_ok=True)
    parts = LoadedParts(model, model.network, (), stored, device, frozenset())
    for layer in sorted(set(model.weight_layers()) - stored.integers.layers()):
        if not intact(file := folder / f"{layer}.safetensors"):
            with parts.loaded([f"{layer}.weight"]):
                save_result(file, UnitResult({layer: model.layer(layer).quantized_weight()}, {}), {})


def freeze_outline(model: QuantizedNetwork, integers: IntegerWeights) -> None:
    """Give a network on the meta device the ranges of its integer weights; their codes are on the meta device, too."""
    for layer in model.weight_layers():
        parts = integers.read([layer])[layer]
        model.freeze(layer, tuple(part._replace(codes=part.codes.to(META)) for part in parts))


@dataclass(eq=False)
class TrainWeights(Stage):
    """The network trained on images. It knows no timesteps of a sampler: another sampler needs no other training."""

    method: QuantizationAwareTrain
    examples: EncodeExamples
    stored_as = "weights"

    @cached_property
    def labels(self) -> Sequence[Any]:
        """Class or caption of every training image; none for an unconditional network."""
        return self.method.labels.of(self.run.training_images) if self.method.labels else ()

    def inputs(self) -> Mapping[str, Any]:
        data = {"examples": self.examples.key, "schedule": dict(self.run.denoiser.schedule), "seed": self.run.seed}
        sampler = self.run.sampling.sampler  # of which the network's convention counts
        convention = {"convention": sampler.convention} if isinstance(sampler, PipelineSampler) else {}
        return {**self.run.weight_inputs, **self.run.layer_inputs, **data, **convention, **label_inputs(self.labels)}

    def compute(self, folder: Path) -> None:
        self.sampled_model()  # what cannot be sampled is refused before the training
        with learning(self.pipeline, self.name, folder, "training") as callbacks:
            task = self.task(folder / "checkpoints", *callbacks)
            self.method(task)
        tensors = {name: value.detach().cpu().clone().contiguous() for name, value in task.model.state_dict().items()}
        self.pipeline.store.write(folder / TRAINED, partial(save_file, tensors))
        if self.pipeline.group.is_main:
            shutil.rmtree(folder / "checkpoints", ignore_errors=True)

    def count(self) -> int:
        return max((int(path.stem) for path in self.entry.path.glob("checkpoints/*.ckpt")), default=0)

    def task(self, folder: Path, units: UnitCheckpointer, callback: ProgressCallback) -> TrainingContext:
        """The training, of a quantized network at all timesteps of the schedule; `folder` is of Lightning's checkpoints."""
        run, noise = self.run, TrainingNoise.of(self.run.denoiser.schedule, self.run.sampling.sampler)
        model = run.quantized_network(replace(run.resolved, timesteps=noise.timesteps))
        if isinstance(run.denoiser.encoder, PipelineEncoder):
            run.denoiser.encoder.prepare(self.labels)
        data = self.examples.examples(), self.labels, run.denoiser.encoder, noise.to(run.denoiser.device)
        return TrainingContext(model, *data, run.compute, run.seed, folder, units, callback)

    def sampled_model(self) -> QuantizedNetwork:
        """The untrained network at the sampler's timesteps; ValueError where it cannot be trained at all timesteps."""
        needed = self.run.denoiser.encoder.example().given
        if needed and not self.labels:
            what = f"this network is conditioned on {', '.join(needed)}: training needs the label of every image"
            raise ValueError(f"{what} (method.weights.labels, docs/methods/qat.md)")
        TrainingNoise.of(self.run.denoiser.schedule, self.run.sampling.sampler)  # refused before the training
        model = self.run.quantized_network()
        for name, quantizer in model.activation_quantizers().items():
            source = quantizer.scale_provider
            if source.per_step:
                raise ValueError(f"{name} has a range for each sampling step; training needs scales for any timestep")
            config = source.config if isinstance(source, EMARange) else None
            few = sum(parameter.numel() for parameter in source.trainable())
            if isinstance(config, TimestepGroupConfig) and config.count > few:
                raise ValueError(
                    f"{name} would be trained with {config.count} intervals, and the sampler's "
                    f"{model.context.num_steps} steps fall into {few} of them: take fewer intervals, or more steps"
                )
        return model

    def model(self) -> QuantizedNetwork:
        """The trained network at the sampler's timesteps, its weights turned into integers."""
        model = self.sampled_model()
        model.load_state_dict(load_file(self.result() / TRAINED))
        return finish(model)


def label_inputs(labels: Sequence[Any]) -> dict[str, str]:
    """Identity of the labels; nothing where there are none."""
    return {"labels_sha256": hashlib.sha256(json.dumps(list(labels)).encode()).hexdigest()} if labels else {}

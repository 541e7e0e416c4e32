"""Weights and activation scales by quantization-aware training on images."""

import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from tfmq_exp.methods.weights import QuantizationAwareTrain
from tfmq_exp.pipeline.learning import learning
from tfmq_exp.pipeline.pipeline import Stage
from tfmq_exp.pipeline.stages.encode_examples import EncodeExamples
from tfmq_exp.qat.model import finish
from tfmq_exp.qat.train import TrainingContext
from tfmq_exp.quant.scales.running_range import EMARange, TimestepGroupConfig
from tfmq_exp.reconstruction.context import ProgressCallback, UnitCheckpointer
from tfmq_exp.sampling.sampler import alphas_cumprod, require_noise_prediction
from tfmq_exp.surgery.quantized_unet import QuantizedUNet

FILE = "trained.safetensors"


@dataclass(eq=False)
class TrainWeights(Stage):
    """The trained network. It knows no timesteps of a sampler: another sampler needs no other training."""

    method: QuantizationAwareTrain
    examples: EncodeExamples
    stored_as = "weights"

    @cached_property
    def labels(self) -> Sequence[Any]:
        """Class or caption of every training image; none for an unconditional network."""
        return self.method.labels.of(self.run.training_images)

    def inputs(self) -> Mapping[str, Any]:
        data = {"examples": self.examples.key, "schedule": dict(self.run.denoiser.schedule), "seed": self.run.seed}
        return {**self.run.weight_inputs, **self.run.layer_inputs, **data, **label_inputs(self.labels)}

    def compute(self, folder: Path) -> None:
        self.sampled_model()  # what cannot be sampled is refused before the training
        with learning(self.pipeline, self.name, folder, "training") as callbacks:
            task = self.task(folder / "checkpoints", *callbacks)
            self.method(task)
        tensors = {name: value.detach().cpu().clone().contiguous() for name, value in task.model.state_dict().items()}
        self.pipeline.store.write(folder / FILE, lambda path: save_file(tensors, path))
        if self.pipeline.group.is_main:
            shutil.rmtree(folder / "checkpoints", ignore_errors=True)

    def count(self) -> int:
        return max((int(path.stem) for path in self.entry.path.glob("checkpoints/*.ckpt")), default=0)

    def task(self, folder: Path, units: UnitCheckpointer, callback: ProgressCallback) -> TrainingContext:
        """The training: a quantized copy of the network that knows all timesteps of the noise schedule, and its data.

        Args:
            folder: of Lightning's checkpoints.
            units: keeps the report.
            callback: shows progress.
        """
        run, alphas = self.run, alphas_cumprod(self.run.denoiser.schedule)
        model = run.quantized_unet(replace(run.resolved, timesteps=tuple(range(len(alphas)))))
        data = self.examples.examples(), self.labels, run.denoiser.encoder, alphas.float().to(run.denoiser.device)
        return TrainingContext(model, *data, run.compute, run.seed, folder, units, callback)

    def sampled_model(self) -> QuantizedUNet:
        """The untrained network at the sampler's timesteps.

        Raises:
            ValueError: a network that predicts no noise, or scales with a range for each of the sampler's steps, which cannot
                be trained at all timesteps.
        """
        require_noise_prediction(self.run.denoiser.schedule, "training")
        model = self.run.quantized_unet()
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

    def model(self) -> QuantizedUNet:
        """The trained network at the sampler's timesteps, its weights turned into integers."""
        model = self.sampled_model()
        model.load_state_dict(load_file(self.result() / FILE))
        return finish(model)


def label_inputs(labels: Sequence[Any]) -> dict[str, str]:
    """Identity of the labels; nothing where there are none."""
    return {"labels_sha256": hashlib.sha256(json.dumps(list(labels)).encode()).hexdigest()} if labels else {}

"""Training images as a denoiser sees them, and a network trained on them, pulled through the store."""

import hashlib
import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from tfmq_exp.calibration.dataset import CalibrationSet
from tfmq_exp.core.finite import naming_rates
from tfmq_exp.data.source import ImageSource
from tfmq_exp.pipeline.float_stages import FloatStages
from tfmq_exp.pipeline.store import Entry
from tfmq_exp.pipeline.unit_checkpoints import FileUnitCheckpointer, LoggingCallback
from tfmq_exp.qat import dataset as examples
from tfmq_exp.qat.dataset import TrainingSet
from tfmq_exp.qat.model import finish
from tfmq_exp.qat.train import TrainingTask
from tfmq_exp.quant.scales.timestep_groups import TimestepGroupScale
from tfmq_exp.reconstruction.callbacks import ProgressCallback, UnitCheckpointer
from tfmq_exp.sampling.schedule import alphas_cumprod, require_noise_prediction
from tfmq_exp.surgery.build import build_quantized_unet
from tfmq_exp.surgery.quantized_unet import QuantizedUNet


@dataclass
class TrainingStages(FloatStages):
    """The stages of methods that train on images."""

    real_images: Callable[[], ImageSource] = field(kw_only=True)

    @cached_property
    def training_images(self) -> ImageSource:
        """The set of images; made once."""
        return self.real_images()

    @cached_property
    def examples(self) -> Entry:
        """x_0 of the training: depends on the images, and on the first stage where there is one."""
        training: Any = self.method.weights
        identity = examples.identity(self.training_images, self.denoiser, mirrored=training.protocol.mirrored)
        return self.store.entry("examples", identity)

    def example_set(self) -> TrainingSet:
        """The same, encoded if the store has none."""
        training: Any = self.method.weights

        def compute(folder: Path) -> None:
            if self.processes.is_main:
                with self.bars.stage("examples", 1) as advance:
                    examples.write(
                        self.training_images,
                        self.denoiser,
                        folder,
                        self.batch,
                        mirrored=training.protocol.mirrored,
                        told=lambda done, of: advance(done / of, f"{done} of {of}"),
                    )

        return TrainingSet.load(self.pull("examples", self.examples, compute))

    @cached_property
    def training_labels(self) -> Sequence[Any]:
        """What the network is told of each image; none where it is told nothing."""
        training: Any = self.method.weights
        return training.labels.of(self.training_images)

    @property
    def training_inputs(self) -> dict[str, Any]:
        """What training depends on, beside the method and where the network is quantized."""
        labels = hashlib.sha256(json.dumps(list(self.training_labels)).encode()).hexdigest()
        return {
            "examples": self.examples.key,
            **({"labels_sha256": labels} if self.training_labels else {}),
            "schedule": dict(self.denoiser.schedule),
            "form": self.plan.trained,
            "seed": self.seed,
        }

    def trained_model(self, entry: Entry) -> QuantizedUNet:
        """The model as it was trained, at the sampler's timesteps, its weights turned into integers.

        What is stored is the state in which it learned, which knows no timesteps: another sampler needs no other training.

        Raises:
            ValueError: a source with a range for each of the sampler's steps, which cannot be trained at all timesteps.
        """
        require_noise_prediction(self.denoiser.schedule, "training")
        model = build_quantized_unet(self.denoiser.unet, self.plan, self.method.weight_observer)
        for name, quantizer in model.activation_quantizers().items():
            source = quantizer.source
            if source.per_step:
                raise ValueError(f"{name} has a range for each sampling step; training needs scales for any timestep")
            if isinstance(source, TimestepGroupScale) and source.unread:
                few = len(source.scale)
                raise ValueError(
                    f"{name} would be trained with {few + source.unread} intervals, and the sampler's "
                    f"{model.context.num_steps} steps fall into {few} of them: take fewer intervals, or more steps"
                )

        def compute(folder: Path) -> None:
            state = self.trained_state(folder).items()
            tensors = {name: value.detach().cpu().clone().contiguous() for name, value in state}
            self.store.write(folder / "trained.safetensors", lambda path: save_file(tensors, path))
            if self.processes.is_main:
                shutil.rmtree(folder / "checkpoints", ignore_errors=True)

        model.load_state_dict(load_file(self.pull("weights", entry, compute) / "trained.safetensors"))
        finish(model)
        return model

    def training_task(self, folder: Path, keeper: UnitCheckpointer, watcher: ProgressCallback) -> TrainingTask:
        """What is trained: a quantized copy of the network that knows all timesteps of its training.

        Args:
            folder: where checkpoints go.
            keeper: of what is measured.
            watcher: who is told.
        """
        alphas = alphas_cumprod(self.denoiser.schedule)
        everywhere = replace(self.plan, timesteps=tuple(range(len(alphas))))
        return TrainingTask(
            build_quantized_unet(self.denoiser.unet, everywhere, self.method.weight_observer),
            self.example_set(),
            self.training_labels,
            self.denoiser.encoder,
            alphas.float().to(self.denoiser.device),
            self.means,
            self.seed,
            folder,
            keeper,
            watcher,
        )

    def trained_state(self, folder: Path) -> dict[str, Any]:
        """Train under a progress bar; checkpoints and what was measured go into the folder."""
        training: Any = self.method.weights
        self.example_set()
        with self.bars.stage("training", 1) as advance:
            watcher = LoggingCallback(advance, self.mirror, "weights")
            keeper = FileUnitCheckpointer(folder / "units", watcher.curves, self.store.write)
            task = self.training_task(folder / "checkpoints", keeper, watcher)
            with naming_rates("method.weights"):
                training(task)
        self.shown_losses |= watcher.shown
        if self.processes.is_main:
            keeper.write_notes(folder)
        return task.model.state_dict()

    @property
    def trains_on_images(self) -> bool:
        """Whether weights are learned from training images."""
        return self.method.weights.data == "images"

    @property
    def follows_trajectories(self) -> bool:
        """Whether the method learns or observes anything along trajectories of the float model."""
        observed = self.method.activations.effort(self.calibration.images, len(self.calls)).samples
        return self.method.weights.data == "trajectories" or bool(observed)

    def no_trajectories(self) -> CalibrationSet:
        """A calibration set without samples."""
        none = torch.zeros(0, dtype=torch.long)
        return CalibrationSet(torch.zeros(0, *self.denoiser.sample_shape), none, none, none)

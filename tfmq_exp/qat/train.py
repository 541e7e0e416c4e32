"""Training of a quantized network, from its float weights to the moving average that is the result, with resume."""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.plugins.io import TorchCheckpointIO

from tfmq_exp.core.distributed import concatenated
from tfmq_exp.core.files import hash_path, intact, write_checked
from tfmq_exp.core.finite import DivergedError, require_finite
from tfmq_exp.core.seeds import Stream
from tfmq_exp.denoisers.denoiser import ConditionEncoder
from tfmq_exp.denoisers.families.dit import keep_labels
from tfmq_exp.qat.conditioning import ConditionDropout
from tfmq_exp.qat.dataset import Batch, BatchRange, NoisyBatches, TrainingSet
from tfmq_exp.qat.model import observe, penalty, ready, trainable
from tfmq_exp.qat.module import QuantizationAwareTraining, TrainingProtocol, loss, predict
from tfmq_exp.qat.training_noise import TrainingNoise
from tfmq_exp.reconstruction.context import (
    ComputeConfig,
    ProgressCallback,
    UnitCheckpointer,
    UnitReport,
    UnitResult,
    peak_memory_mib,
)
from tfmq_exp.reconstruction.unit_learning import ERROR_SAMPLES
from tfmq_exp.surgery.quantized_network import QuantizedNetwork

UNIT = "network"  # name of the only unit, in reports
LOSS_POINTS = 1000  # of the loss curve


@dataclass(frozen=True)
class TrainingContext:
    """Everything that training takes."""

    model: (
        QuantizedNetwork  # its timestep context knows all timesteps of the training, and no quantizer is calibrated yet
    )
    images: TrainingSet  # x_0 of the training images
    labels: Sequence[Any]  # of every image, for the encoder; none for unconditional networks
    encoder: ConditionEncoder  # of labels
    noise: TrainingNoise  # of the network's training, on the network's device
    compute: ComputeConfig  # resources
    seed: int  # of all random numbers
    folder: Path  # of Lightning's checkpoints
    checkpointer: UnitCheckpointer  # saves the report
    progress: ProgressCallback  # follows the work


class LossHistory(pl.Callback):
    """Reports the mean loss since the last report, and counts the seconds of all attempts."""

    def __init__(self, progress: ProgressCallback, iterations: int) -> None:
        self.progress, self.iterations, self.every = progress, iterations, max(1, iterations // LOSS_POINTS)
        self.points: list[tuple[int, float]] = []
        self.earlier_seconds, self.start = 0.0, time.perf_counter()
        self.sum: Any = 0.0  # of losses that are not reported yet; a tensor on the network's device

    def state_dict(self) -> dict[str, Any]:
        return {"points": self.points, "sum": float(self.sum), "seconds": self.seconds()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.points = [(iteration, error) for iteration, error in state_dict["points"]]
        self.earlier_seconds, self.sum = state_dict["seconds"], state_dict["sum"]
        for iteration, error in self.points:  # so that the curve is whole
            self.progress.on_iteration_end(UNIT, iteration, self.iterations, error)

    def on_train_batch_end(self, trainer: pl.Trainer, module: pl.LightningModule, *_: Any) -> None:
        assert isinstance(module, QuantizationAwareTraining)
        self.sum = self.sum + module.error
        if module.iteration % self.every == 0:
            mean = float(self.sum) / self.every
            if not math.isfinite(mean):
                rates = {"protocol.learning_rate": module.protocol.learning_rate}
                raise DivergedError("the training", module.iteration, self.iterations, mean, rates)
            self.points.append((module.iteration, mean))
            self.progress.on_iteration_end(UNIT, module.iteration, self.iterations, mean)
            self.sum = 0.0

    def seconds(self) -> float:
        """Seconds of training so far."""
        return self.earlier_seconds + time.perf_counter() - self.start


class PeriodicCheckpoint(pl.Callback):
    """Saves the training at intervals of time; Lightning's own does not where the optimiser is stepped by hand.

    Last of the callbacks, so that the others have counted the iteration.
    """

    def __init__(self, folder: Path, every: timedelta) -> None:
        self.folder, self.every = folder, every.total_seconds()
        self.last = time.monotonic()

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if time.monotonic() - self.last < self.every:
            return
        older = list(self.folder.glob("*.ckpt"))  # deleted once the new one is whole
        self.folder.mkdir(parents=True, exist_ok=True)
        trainer.save_checkpoint(self.folder / f"{trainer.global_step:09d}.ckpt")
        for path in older:
            path.unlink()
            hash_path(path).unlink(missing_ok=True)
        self.last = time.monotonic()


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes checkpoints atomically into their folder; Lightning's go through memory and the system's temporary folder."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        write_checked(Path(path), lambda partial: torch.save(checkpoint, partial))


def last_checkpoint(folder: Path) -> Path | None:
    """The latest undamaged checkpoint, if there is one."""
    return next(filter(intact, sorted(folder.glob("*.ckpt"), reverse=True)), None)


def train(context: TrainingContext, protocol: TrainingProtocol) -> None:
    """Calibrate the quantizers, train from the last checkpoint if there is one, and leave the parameters' average in the model.

    The error of the prediction is measured before and after, saved and reported.
    """
    model, compute, processes = context.model, context.compute, context.compute.processes
    context.progress.on_start(1)
    module, batches = prepare_training(context, protocol)
    error_before = prediction_error(module, batches, compute.batch)
    history = LossHistory(context.progress, protocol.iterations)
    checkpoint = processes.broadcast(last_checkpoint(context.folder) if processes.is_main else None)
    remaining = BatchRange(batches, int(checkpoint.stem) if checkpoint else 0, protocol.iterations)
    saving = [PeriodicCheckpoint(context.folder, compute.checkpoint_every)] if processes.is_main else []
    settings = {"max_steps": protocol.iterations, "precision": protocol.precision, "plugins": [AtomicCheckpointIO()]}
    trainer = compute.trainer(callbacks=[history, *saving], **settings)
    with torch.enable_grad(), torch.random.fork_rng():
        trainer.fit(module.train(), remaining, ckpt_path=checkpoint, weights_only=True)
    module.to(context.noise.given.device)  # Lightning has moved it to the CPU
    for parameter, mean in zip(module.trained, module.ema, strict=True):
        parameter.requires_grad_(False).copy_(mean)
    result = concatenated(module.trained)
    processes.check_same("what was trained", result)
    require_finite(result, "what was trained")
    error_after = prediction_error(module, batches, compute.batch)
    size = len(model.plan.layers), sum(parameter.numel() for parameter in module.groups.weights)
    report = UnitReport(UNIT, "training", *size, error_before, error_after, history.seconds(), peak_memory_mib())
    context.checkpointer.put(UNIT, UnitResult({}, {}), report)
    context.progress.on_unit_end(UNIT, report)


def prepare_training(
    context: TrainingContext, protocol: TrainingProtocol
) -> tuple[QuantizationAwareTraining, NoisyBatches]:
    """Calibrate the quantizers; return the module and the batches of its training."""
    model, noise, seed = context.model, context.noise, context.seed
    conditions, device = ConditionDropout(context.encoder, context.labels), noise.given.device
    drawn = len(noise.timesteps), protocol.condition_dropout, seed
    batches = NoisyBatches(context.images, protocol.batch, *drawn, drawn=noise.drawn)
    keep_labels(model)
    observe(model)
    with torch.no_grad(), model.naming_activations():
        for batch in BatchRange(replace(batches, stream=Stream.RANGE_CALIBRATION), 0, protocol.calibration_batches):
            predict(model, batch.on(device), conditions, noise)
    ready(model)
    given = (model, trainable(model), lambda: penalty(model), conditions, noise, protocol, seed)
    return QuantizationAwareTraining(*given, context.compute.processes).to(device), batches


@torch.no_grad()
def prediction_error(module: QuantizationAwareTraining, batches: NoisyBatches, size: int) -> float:
    """Mean squared error of the prediction on a fixed batch; in evaluation mode, `size` rows a pass."""
    module.model.eval()
    batch = replace(batches, size=ERROR_SAMPLES, stream=Stream.ERROR, condition_dropout=0.0).batch(0)
    total = 0.0
    for rows in zip(*(field.split(size) for field in batch), strict=True):
        part = Batch(*rows).on(module.noise.given.device)
        predicted = predict(module.model, part, module.conditions, module.noise)
        require_finite(predicted, "what the quantized network predicts for training images")
        total += float(loss(predicted, module.noise.target(part.clean, part.noise, part.t), "l2")) * len(part.t)
    return total / ERROR_SAMPLES

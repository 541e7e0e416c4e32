"""Train a quantized network from its float weights to the average that is kept, across interruptions."""

import math
import resource
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from jaxtyping import Float
from pytorch_lightning.plugins.io import TorchCheckpointIO
from torch import Tensor

from tfmq_exp.core.files import hash_path, intact, write_checked
from tfmq_exp.core.finite import DivergedError, require_finite
from tfmq_exp.denoisers.denoiser import ConditionEncoder, noise_of
from tfmq_exp.qat.batches import Batch, NoisyBatches, ResumedBatches
from tfmq_exp.qat.conditioning import ConditionDropout
from tfmq_exp.qat.dataset import TrainingSet
from tfmq_exp.qat.ema import put_back
from tfmq_exp.qat.loss import loss, noisy
from tfmq_exp.qat.model import observe, penalty, ready, trainable
from tfmq_exp.qat.module import QuantizationAwareTraining, TrainingProtocol
from tfmq_exp.reconstruction.callbacks import ProgressCallback, UnitCheckpointer, UnitReport
from tfmq_exp.reconstruction.callbacks import UnitResult as Kept
from tfmq_exp.reconstruction.gradients import flat
from tfmq_exp.reconstruction.loop import ERROR_SAMPLES, ComputeConfig
from tfmq_exp.surgery.quantized_unet import QuantizedUNet

UNIT = "network"  # what learns, to those who are told
REPORTS = 1000  # of its loss


@dataclass(frozen=True)
class TrainingTask:
    """What is trained, on what, and with what.

    Args:
        model: with a context that knows all timesteps of the training, and nothing placed yet.
        examples: x_0 of the training images.
        labels: of every image, for the encoder; none where the network is told nothing.
        encoder: of labels.
        alphas_cumprod: alpha-bar of every timestep of the training.
        means: memory and machine.
        seed: of all random numbers.
        folder: where checkpoints go.
        keeper: of what was measured.
        watcher: who is told.
    """

    model: QuantizedUNet
    examples: TrainingSet
    labels: Sequence[Any]
    encoder: ConditionEncoder
    alphas_cumprod: Float[Tensor, "timesteps"]
    means: ComputeConfig
    seed: int
    folder: Path
    keeper: UnitCheckpointer
    watcher: ProgressCallback


class Progress(pl.Callback):
    """Tells the watcher the mean loss since the last time, and counts the seconds of all attempts."""

    def __init__(self, watcher: ProgressCallback, iterations: int) -> None:
        self.watcher, self.iterations, self.every = watcher, iterations, max(1, iterations // REPORTS)
        self.told: list[tuple[int, float]] = []
        self.seconds, self.began = 0.0, time.perf_counter()
        self.sum: Any = 0.0  # of losses that have not been told; a tensor where the network is

    def state_dict(self) -> dict[str, Any]:
        """Kept with every checkpoint."""
        return {"told": self.told, "sum": float(self.sum), "seconds": self.spent()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """What an interrupted attempt has told is told again, so that the curve is whole."""
        self.told = [(number, error) for number, error in state_dict["told"]]
        self.seconds, self.sum = state_dict["seconds"], state_dict["sum"]
        for number, error in self.told:
            self.watcher.iteration(UNIT, number, self.iterations, error)

    def on_train_batch_end(self, trainer: pl.Trainer, module: pl.LightningModule, *_: Any) -> None:
        """After an iteration."""
        assert isinstance(module, QuantizationAwareTraining)
        self.sum = self.sum + module.error
        if module.count % self.every == 0:
            loss = float(self.sum) / self.every
            if not math.isfinite(loss):
                rates = {"protocol.learning_rate": module.protocol.learning_rate}
                raise DivergedError("the training", module.count, self.iterations, loss, rates)
            self.told.append((module.count, loss))
            self.watcher.iteration(UNIT, module.count, self.iterations, self.told[-1][1])
            self.sum = 0.0

    def spent(self) -> float:
        """Seconds so far."""
        return self.seconds + time.perf_counter() - self.began


class Checkpoints(pl.Callback):
    """Keeps the state of a training by the context, which Lightning's own does not where the optimiser is stepped by hand.

    What other callbacks have to say of an iteration they must say first.
    """

    def __init__(self, folder: Path, every: timedelta) -> None:
        self.folder, self.every = folder, every.total_seconds()
        self.last = time.monotonic()

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        """The new one is whole before the old one goes."""
        if time.monotonic() - self.last < self.every:
            return
        older = list(self.folder.glob("*.ckpt"))
        self.folder.mkdir(parents=True, exist_ok=True)
        trainer.save_checkpoint(self.folder / f"{trainer.global_step:09d}.ckpt")
        for path in older:
            path.unlink()
            hash_path(path).unlink(missing_ok=True)
        self.last = time.monotonic()


class AtomicCheckpointIO(TorchCheckpointIO):
    """Checkpoints that are there whole or not at all; Lightning's go through memory and the system's temporary folder."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Straight beside the older one."""
        write_checked(Path(path), lambda partial: torch.save(checkpoint, partial))


def prepared(task: TrainingTask, protocol: TrainingProtocol) -> tuple[QuantizationAwareTraining, NoisyBatches]:
    """What is trained, with its quantizers where they start, and what it learns from."""
    model = task.model
    batches = NoisyBatches(task.examples, protocol.batch, len(task.alphas_cumprod), protocol.untold, task.seed)
    telling = ConditionDropout(task.encoder, task.labels)
    observe(model)
    with torch.no_grad(), model.naming_activations():
        for batch in replace(batches, stream="observed").since(0, protocol.observed):
            predict(model, batch, telling, task.alphas_cumprod)
    ready(model)
    lesson = QuantizationAwareTraining(
        model,
        trainable(model),
        lambda: penalty(model),
        telling,
        task.alphas_cumprod,
        protocol,
        task.seed,
        task.means.processes,
    )
    lesson.to(task.alphas_cumprod.device)
    return lesson, batches


def train(task: TrainingTask, protocol: TrainingProtocol) -> None:
    """Place the quantizers, train, and leave the average of what was learned in the model."""
    model, processes = task.model, task.means.processes
    task.watcher.start(1)
    lesson, batches = prepared(task, protocol)
    before = judge(lesson, batches, task.means.batch)
    progress = Progress(task.watcher, protocol.iterations)
    checkpoint = processes.broadcast(
        last_checkpoint(task.folder) if processes.is_main else None
    )  # which reads it through
    with torch.enable_grad(), torch.random.fork_rng():
        fit(lesson, batches, checkpoint, progress, task)
    lesson.to(task.alphas_cumprod.device)  # Lightning has left it on the CPU
    put_back(lesson.average, lesson.parameters_learned)
    for parameter in lesson.parameters_learned:
        parameter.requires_grad_(False)
    processes.check_same("what was trained", flat([p.detach() for p in lesson.parameters_learned]))
    require_finite(flat([p.detach() for p in lesson.parameters_learned]), "what was trained")
    after = judge(lesson, batches, task.means.batch)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    layers, weights = len(model.plan.sites), sum(parameter.numel() for parameter in lesson.learned.weights)
    report = UnitReport(UNIT, "training", layers, weights, before, after, progress.spent(), peak)
    task.keeper.put(UNIT, Kept({}, {}), report)
    task.watcher.finished(UNIT, report)


def predict(
    model: QuantizedUNet, batch: Batch, telling: ConditionDropout, alphas_cumprod: Tensor
) -> tuple[Tensor, Tensor]:
    """The noise that a network sees in a batch, and the noise that is there, where the network is."""
    device = alphas_cumprod.device
    batch = Batch(*(field.to(device) for field in batch))
    x = noisy(batch.clean, batch.noise, batch.t, alphas_cumprod)
    return noise_of(
        model(x, batch.t, outside="nearest_step", **telling(batch.rows, batch.told, device)).sample, x
    ), batch.noise


@torch.no_grad()
def judge(lesson: QuantizationAwareTraining, batches: NoisyBatches, together: int) -> float:
    """The squared error of the predicted noise, whose variance is 1, for examples, noise and timesteps that are always the same.

    Args:
        lesson: whose model, in evaluation mode afterwards.
        batches: of its training.
        together: rows that go through the network at once.
    """
    lesson.model.eval()
    batch = replace(batches, size=ERROR_SAMPLES, stream="judged", untold=0.0).batch(0)
    parts = [Batch(*rows) for rows in zip(*(field.split(together) for field in batch), strict=True)]
    pairs = [predict(lesson.model, part, lesson.telling, lesson.alphas_cumprod) for part in parts]
    for predicted, _ in pairs:
        require_finite(predicted, "the noise that the quantized network predicts for training images")
    return sum(float(loss(*pair, "l2")) * len(pair[1]) for pair in pairs) / ERROR_SAMPLES


def last_checkpoint(folder: Path) -> Path | None:
    """That of the latest iteration that is whole, if there is one; others are named and left out."""
    return next(filter(intact, sorted(folder.glob("*.ckpt"), reverse=True)), None)


def fit(
    lesson: QuantizationAwareTraining,
    batches: NoisyBatches,
    checkpoint: Path | None,
    progress: Progress,
    task: TrainingTask,
) -> None:
    """Lightning's loop over the iterations that are left."""
    protocol, processes = lesson.protocol, task.means.processes
    callbacks: list[pl.Callback] = [progress]
    if processes.is_main:
        callbacks.append(Checkpoints(task.folder, task.means.checkpoint_every))
    trainer = task.means.trainer(
        max_steps=protocol.iterations,
        callbacks=callbacks,
        plugins=[AtomicCheckpointIO()],
        precision=protocol.precision,
    )
    done = int(checkpoint.stem) if checkpoint else 0
    trainer.fit(
        lesson.train(), ResumedBatches(batches, done, protocol.iterations), ckpt_path=checkpoint, weights_only=True
    )

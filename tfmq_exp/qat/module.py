"""The LightningModule of quantization-aware training, and its protocol."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytorch_lightning as pl
import torch
from jaxtyping import Float
from torch import Tensor, nn

import tfmq_exp.core.validate as kinds
from tfmq_exp.core.distributed import ALONE, ProcessGroup, set_gradients
from tfmq_exp.core.seeds import Stream, derive_seed
from tfmq_exp.denoisers.denoiser import noise_of
from tfmq_exp.qat.batches import Batch
from tfmq_exp.qat.conditioning import ConditionDropout
from tfmq_exp.qat.ema import moving_average
from tfmq_exp.qat.loss import LOSSES, Norm, loss, noisy
from tfmq_exp.qat.model import TrainableParameters, clamp_parameters
from tfmq_exp.surgery.quantized_unet import QuantizedUNet

# What the fields of a protocol may be.
FIELDS: dict[str, kinds.Kind] = {
    **dict.fromkeys(("iterations", "batch", "calibration_batches", "parts"), kinds.COUNT),
    **dict.fromkeys(("range_lr_scale", "weight_decay"), kinds.AMOUNT),
    "loss": kinds.one_of(*LOSSES),
    "learning_rate": kinds.RATE,
    "warmup": kinds.ANY_COUNT,
    "warmup_start_factor": kinds.POSITIVE_SHARE,
    "ema_decay": kinds.DECAY,
    "gradient_clip_val": kinds.optional(kinds.POSITIVE),
    "condition_dropout": kinds.SHARE,
    "horizontal_flip": kinds.SWITCH,
    "precision": kinds.one_of("32-true", "bf16-mixed", "16-mixed"),
}


@dataclass(frozen=True)
class TrainingProtocol:
    """Hyperparameters of quantization-aware training. The papers' numbers are in conf/.

    Args:
        iterations: optimiser steps.
        batch: rows of each.
        loss: `l2` or `l1`.
        learning_rate: of weights and of networks that generate scales.
        range_lr_scale: learning rate of static ranges over that; they have no weight decay.
        weight_decay: AdamW's.
        warmup: iterations in which the learning rate rises linearly; constant afterwards.
        ema_decay: of the moving average that is the result.
        calibration_batches: batches that ranges start from.
        warmup_start_factor: share of the learning rate at the first iteration.
        gradient_clip_val: largest norm of the gradient; null for any.
        condition_dropout: share of rows whose condition is dropped.
        horizontal_flip: whether mirror images are trained on, too.
        precision: of the products, as Lightning calls it.
        parts: microbatches of a batch, one after the other or on several processes. Results depend on their number in the
            last bits, and not on the number of processes.
    """

    iterations: int
    batch: int
    loss: Norm
    learning_rate: float
    range_lr_scale: float
    weight_decay: float
    warmup: int
    ema_decay: float
    calibration_batches: int
    warmup_start_factor: float = 1e-6
    gradient_clip_val: float | None = None
    condition_dropout: float = 0.0
    horizontal_flip: bool = False
    precision: str = "32-true"
    parts: int = 1

    def __post_init__(self) -> None:
        kinds.check_fields(self, **FIELDS)
        if self.parts > self.batch:
            raise ValueError(f"a batch of {self.batch} can have 1 to {self.batch} parts, got {self.parts}")


def predict_noise(
    model: QuantizedUNet, batch: Batch, conditions: ConditionDropout, alphas_cumprod: Float[Tensor, "timesteps"]
) -> Tensor:
    """The noise that the network predicts in a batch on its device.

    Args:
        model: the quantized network; timesteps that the sampler does not visit take the scales of the nearest step.
        batch: x_0, noise and timesteps.
        conditions: of the batch's images.
        alphas_cumprod: alpha-bar of every timestep of the training.

    Returns:
        the prediction, of the shape of the noise.
    """
    x = noisy(batch.clean, batch.noise, batch.t, alphas_cumprod)
    given = conditions(batch.rows, batch.conditioned, x.device)
    return noise_of(model(x, batch.t, outside="nearest", **given).sample, x)


class QuantizationAwareTraining(pl.LightningModule):
    """Minimises the error of the predicted noise, plus a penalty of the quantizers.

    Lightning steps the optimiser, for its precisions and checkpoints; gradients are computed microbatch by microbatch and
    summed in their order, on whichever rank they are.

    Args:
        model: quantizers calibrated, and in the mode in which they learn.
        parameters: all that is trained in it, by group.
        penalty: of the quantizers; independent of the batch, so it is added once.
        conditions: of a batch.
        alphas_cumprod: alpha-bar of every timestep of the training.
        protocol: how it is trained.
        seed: of random numbers inside the network.
        processes: ranks that share the microbatches.
    """

    alphas_cumprod: Tensor
    error: Tensor
    penalty: Callable[[], Tensor | float]
    conditions: ConditionDropout

    def __init__(
        self,
        model: QuantizedUNet,
        parameters: TrainableParameters,
        penalty: Callable[[], Tensor | float],
        conditions: ConditionDropout,
        alphas_cumprod: Float[Tensor, "timesteps"],
        protocol: TrainingProtocol,
        seed: int,
        processes: ProcessGroup = ALONE,
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.model, self.groups, self.penalty, self.conditions = model, parameters, penalty, conditions
        self.protocol, self.seed, self.processes = protocol, seed, processes
        self.register_buffer("alphas_cumprod", alphas_cumprod, persistent=False)
        self.register_buffer("error", torch.zeros(()))  # of the last batch, without the penalty
        self.trained = list(dict.fromkeys([*parameters.weights, *parameters.ranges, *parameters.generators]))
        self.ema = moving_average(self.trained, protocol.ema_decay)
        self.iteration = 0  # iterations so far, with those before an interruption

    def on_train_start(self) -> None:
        self.iteration = self.trainer.global_step  # of the checkpoint, if Lightning has read one

    def training_step(self, batch: Batch, _: int) -> None:
        schedule: Any = self.lr_schedulers()
        self.iterate(self.optimizers(), batch)
        schedule.step()

    def iterate(self, optimizer: Any, batch: Batch) -> None:
        """One iteration, without the schedule of the learning rate."""
        self.set_gradients(optimizer, batch)
        optimizer.step()
        clamp_parameters(self.model)
        self.ema.update_parameters(nn.ParameterList(self.trained))
        self.iteration += 1

    def set_gradients(self, optimizer: Any, batch: Batch) -> None:
        """Set the gradients of the loss, summed over microbatches, and of the penalty, added to those of the first."""
        rows = len(batch.rows)
        count = min(self.protocol.parts, rows)

        def compute(index: int) -> list[Tensor]:
            # the same draws on any rank
            torch.manual_seed(derive_seed(self.seed, Stream.NETWORK, self.iteration, index))
            optimizer.zero_grad()
            microbatch = Batch(*(field.tensor_split(count)[index] for field in batch))
            error = self.loss(microbatch) * (len(microbatch.rows) / rows)
            self.manual_backward(error + (self.penalty() if index == 0 else 0.0))
            gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.trained]
            return [*gradients, error.detach()]

        self.error.copy_(set_gradients(self.trained, count, self.processes, compute))

    def loss(self, batch: Batch) -> Tensor:
        """Loss of the predicted noise for some rows."""
        predicted = predict_noise(self.model, batch, self.conditions, self.alphas_cumprod)
        return loss(predicted, batch.noise, self.protocol.loss)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        if self.protocol.gradient_clip_val is not None:  # the gradient no longer has the scale of half precision
            nn.utils.clip_grad_norm_(self.trained, self.protocol.gradient_clip_val)

    def configure_optimizers(self) -> Any:
        """AdamW with settings for each group of parameters; the learning rate rises linearly and then stays."""
        protocol, groups = self.protocol, []
        settings = (
            (self.groups.weights, protocol.learning_rate, protocol.weight_decay),
            (self.groups.ranges, protocol.learning_rate * protocol.range_lr_scale, 0.0),
            (self.groups.generators, protocol.learning_rate, protocol.weight_decay),
        )
        for parameters, rate, decay in settings:
            if parameters:
                groups.append({"params": list(dict.fromkeys(parameters)), "lr": rate, "weight_decay": decay})
        # a fused step takes half precision's scale off the gradient itself, after it was clipped
        half = protocol.precision == "16-mixed"
        optimizer = torch.optim.AdamW(groups, foreach=half, fused=not half)
        start, iterations = (protocol.warmup_start_factor, protocol.warmup) if protocol.warmup else (1.0, 1)
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, start, total_iters=iterations)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

"""The LightningModule of quantization-aware training, and its protocol."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

import tfmq_exp.core.validate as kinds
from tfmq_exp.core.distributed import ALONE, ProcessGroup, summed_gradients
from tfmq_exp.core.seeds import Stream, derive_seed, seed_draws
from tfmq_exp.denoisers.denoiser import noise_of
from tfmq_exp.qat.conditioning import ConditionDropout
from tfmq_exp.qat.dataset import Batch
from tfmq_exp.qat.model import TrainableParameters, clamp_parameters
from tfmq_exp.qat.training_noise import TrainingNoise
from tfmq_exp.surgery.quantized_network import QuantizedNetwork

Norm = Literal["l1", "l2"]
LOSSES = {"l1": F.l1_loss, "l2": F.mse_loss}
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
    """Hyperparameters of quantization-aware training. The papers' numbers are in conf/."""

    iterations: int  # optimiser steps
    batch: int  # rows of each
    loss: Norm  # `l2` or `l1`
    learning_rate: float  # of weights and of networks that generate scales
    range_lr_scale: float  # learning rate of static ranges over that; they have no weight decay
    weight_decay: float  # AdamW's
    warmup: int  # iterations in which the learning rate rises linearly; constant afterwards
    ema_decay: float  # of the moving average that is the result
    calibration_batches: int  # batches that ranges start from
    warmup_start_factor: float = 1e-6  # share of the learning rate at the first iteration
    gradient_clip_val: float | None = None  # largest norm of the gradient; null for any
    condition_dropout: float = 0.0  # share of rows whose condition is dropped
    horizontal_flip: bool = False  # whether mirror images are trained on, too
    precision: str = "32-true"  # of the products, as Lightning calls it
    # microbatches of a batch, one after the other or on several processes. Results depend on their number in the last
    # bits, and not on the number of processes.
    parts: int = 1

    def __post_init__(self) -> None:
        kinds.check_fields(self, **FIELDS)
        if self.parts > self.batch:
            raise ValueError(f"a batch of {self.batch} can have 1 to {self.batch} parts, got {self.parts}")


def loss(
    predicted: Float[Tensor, "batch *rest"], target: Float[Tensor, "batch *rest"], norm: Norm
) -> Float[Tensor, ""]:
    """Mean squared (l2) or absolute (l1) error of a prediction (DDPM, eq. 14), in float32 whatever the network's precision."""
    return LOSSES[norm](predicted.float(), target.float())


def predict(model: QuantizedNetwork, batch: Batch, conditions: ConditionDropout, noise: TrainingNoise) -> Tensor:
    """The prediction for a batch on the model's device; timesteps of no sampling step take the nearest step's scales."""
    x = noise.noisy(batch.clean, batch.noise, batch.t)
    given = conditions(batch.rows, batch.conditioned, x.device)
    return noise_of(model(x, noise.given[batch.t], outside="nearest", **given).sample, x)


def update_average(average: Sequence[Tensor], current: Sequence[Tensor], number: int, decay: float) -> None:
    """Count the current parameters in their exponential moving average, as its update `number`, from 1.

    The past weighs (1 + n) / (10 + n) until that exceeds `decay` (LDM's LitEma).
    """
    get_ema_multi_avg_fn(min(decay, (1 + number) / (10 + number)))(list(average), list(current), number)


class QuantizationAwareTraining(pl.LightningModule):
    """Minimises the error of the prediction, plus a penalty of the quantizers.

    Lightning steps the optimiser, for its precisions and checkpoints; gradients are computed microbatch by microbatch and
    summed in their order, on whichever rank they are.

    Args:
        model: quantizers calibrated, and in the mode in which they learn.
        parameters: all that is trained in it, by group.
        penalty: of the quantizers; independent of the batch, so it is added once.
        conditions: of a batch.
        noise: of the network's training, on the model's device.
        protocol: how it is trained.
        seed: of random numbers inside the network.
        processes: ranks that share the microbatches.
    """

    error: Tensor
    penalty: Callable[[], Tensor | float]
    conditions: ConditionDropout

    def __init__(
        self,
        model: QuantizedNetwork,
        parameters: TrainableParameters,
        penalty: Callable[[], Tensor | float],
        conditions: ConditionDropout,
        noise: TrainingNoise,
        protocol: TrainingProtocol,
        seed: int,
        processes: ProcessGroup = ALONE,
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.model, self.groups, self.penalty, self.conditions = model, parameters, penalty, conditions
        self.noise = noise
        self.protocol, self.seed, self.processes = protocol, seed, processes
        self.register_buffer("error", torch.zeros(()))  # of the last batch, without the penalty
        self.trained = list(dict.fromkeys(parameter for group in parameters for parameter in group))
        self.ema = nn.ParameterList(p.detach().clone() for p in self.trained).requires_grad_(False)
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
        self.iteration += 1
        update_average(list(self.ema), self.trained, self.iteration, self.protocol.ema_decay)

    def set_gradients(self, optimizer: Any, batch: Batch) -> None:
        """Set the gradients of the loss, summed over microbatches, and of the penalty, added to those of the first."""
        rows = len(batch.rows)
        count = min(self.protocol.parts, rows)

        def compute(index: int) -> list[Tensor]:
            # the same draws on any rank
            seed_draws(self.device, derive_seed(self.seed, Stream.NETWORK, self.iteration, index))
            optimizer.zero_grad()
            microbatch = Batch(*(field.tensor_split(count)[index] for field in batch))
            error = self.loss(microbatch) * (len(microbatch.rows) / rows)
            self.manual_backward(error + (self.penalty() if index == 0 else 0.0))
            gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.trained]
            return [*gradients, error.detach()]

        total = summed_gradients(self.trained, count, self.processes, compute)
        for parameter, gradient in zip(self.trained, total.split([*map(Tensor.numel, self.trained), 1]), strict=False):
            parameter.grad = gradient.view_as(parameter)
        self.error.copy_(total[-1])

    def loss(self, batch: Batch) -> Tensor:
        """Loss of the prediction for some rows."""
        predicted = predict(self.model, batch, self.conditions, self.noise)
        return loss(predicted, self.noise.target(batch.clean, batch.noise, batch.t), self.protocol.loss)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        if self.protocol.gradient_clip_val is not None:  # the gradient no longer has the scale of half precision
            nn.utils.clip_grad_norm_(self.trained, self.protocol.gradient_clip_val)

    def configure_optimizers(self) -> Any:
        """AdamW with settings for each group of parameters; the learning rate rises linearly and then stays."""
        protocol, rate, decay = self.protocol, self.protocol.learning_rate, self.protocol.weight_decay
        settings = (rate, decay), (rate * protocol.range_lr_scale, 0.0), (rate, decay)
        groups = [
            {"params": list(dict.fromkeys(parameters)), "lr": lr, "weight_decay": weight_decay}
            for parameters, (lr, weight_decay) in zip(self.groups, settings, strict=True)
            if parameters
        ]
        # a fused step takes half precision's scale off the gradient itself, after it was clipped
        half = protocol.precision == "16-mixed"
        optimizer = torch.optim.AdamW(groups, foreach=half, fused=not half)
        start, iterations = (protocol.warmup_start_factor, protocol.warmup) if protocol.warmup else (1.0, 1)
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, start, total_iters=iterations)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

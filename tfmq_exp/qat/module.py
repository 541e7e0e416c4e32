"""One LightningModule trains a whole quantized network: its weights, the ranges of its quantizers, and what generates them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import pytorch_lightning as pl
import torch
from jaxtyping import Float
from torch import Tensor, nn

from tfmq_exp.core.distributed import ALONE, ProcessGroup
from tfmq_exp.core.seeds import derive_seed
from tfmq_exp.core.validate import (
    AMOUNT,
    ANY_COUNT,
    COUNT,
    DECAY,
    POSITIVE,
    POSITIVE_SHARE,
    RATE,
    SHARE,
    SWITCH,
    Kind,
    check_fields,
    one_of,
    optional,
)
from tfmq_exp.denoisers.denoiser import noise_of
from tfmq_exp.qat.batches import Batch
from tfmq_exp.qat.conditioning import ConditionDropout
from tfmq_exp.qat.ema import moving_average
from tfmq_exp.qat.loss import LOSSES, Norm, loss, noisy
from tfmq_exp.qat.model import clamp_parameters
from tfmq_exp.reconstruction.gradients import set_gradients
from tfmq_exp.surgery.quantized_unet import QuantizedUNet

PRECISIONS = ("32-true", "bf16-mixed", "16-mixed")
# What fields of a protocol must be.
RIGHT: Mapping[str, Kind] = {
    **dict.fromkeys(("iterations", "batch", "observed", "parts"), COUNT),
    "learning_rate": RATE,
    "first_rate": POSITIVE_SHARE,
    **dict.fromkeys(("range_rate", "weight_decay"), AMOUNT),
    "warmup": ANY_COUNT,
    "loss": one_of(*LOSSES),
    "average": DECAY,
    "clip": optional(POSITIVE),
    "untold": SHARE,
    "mirrored": SWITCH,
    "precision": one_of(*PRECISIONS),
}


@dataclass(frozen=True)
class TrainingProtocol:
    """How a network is trained. The papers' numbers live in conf/.

    Args:
        iterations: optimiser steps.
        batch: rows of each.
        loss: `l2` or `l1`.
        learning_rate: of weights and of networks that generate ranges.
        range_rate: learning rate of static ranges over that; they have no weight decay.
        weight_decay: AdamW's.
        warmup: iterations in which the learning rate rises linearly; constant afterwards.
        first_rate: share of the learning rate at the first iteration.
        average: decay of the moving average that is kept in the end.
        clip: largest norm of the gradient; null for any.
        untold: share of rows whose condition is dropped.
        observed: batches that ranges are first observed on.
        mirrored: whether mirror images are trained on too.
        precision: of the products, as Lightning calls it.
        parts: how many parts a batch is computed in, one after the other or by several processes. Results depend on them in
            the last bits, and not on the processes.
    """

    iterations: int
    batch: int
    loss: Norm
    learning_rate: float
    range_rate: float
    weight_decay: float
    warmup: int
    average: float
    observed: int
    first_rate: float = 1e-6
    clip: float | None = None
    untold: float = 0.0
    mirrored: bool = False
    precision: str = "32-true"
    parts: int = 1

    def __post_init__(self) -> None:
        check_fields(self, **RIGHT)
        if self.parts > self.batch:
            raise ValueError(f"a batch of {self.batch} can have 1 to {self.batch} parts, got {self.parts}")


class QATResult(Protocol):
    """What is learned, by the kind of settings that it is learned with."""

    @property
    def weights(self) -> Sequence[nn.Parameter]:
        """Of layers, with their biases, and of everything else that the float network has learned."""
        ...

    @property
    def ranges(self) -> Sequence[nn.Parameter]:
        """Intervals, offsets and the like, of weights and of activations."""
        ...

    @property
    def generators(self) -> Sequence[nn.Parameter]:
        """Networks that make ranges of the timestep."""
        ...


class QuantizationAwareTraining(pl.LightningModule):
    """Minimise the error of the predicted noise, plus what the quantizers add to it.

    The optimiser is Lightning's to step, which serves its precisions and checkpoints; gradients are computed part by part and
    added up in the order of the parts, whichever process has them.

    Args:
        model: quantizers placed, in the mode in which they learn.
        learned: parameters of it.
        penalty: what the quantizers add to the loss; of no batch, so it is added once.
        telling: conditions of a batch's rows.
        alphas_cumprod: alpha-bar of every timestep of the training.
        protocol: numbers.
        seed: of what is random inside the network.
        processes: who computes the gradients together.
    """

    alphas_cumprod: Tensor
    error: Tensor
    penalty: Callable[[], Tensor | float]
    telling: ConditionDropout

    def __init__(
        self,
        model: QuantizedUNet,
        learned: QATResult,
        penalty: Callable[[], Tensor | float],
        telling: ConditionDropout,
        alphas_cumprod: Float[Tensor, "timesteps"],
        protocol: TrainingProtocol,
        seed: int,
        processes: ProcessGroup = ALONE,
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.model, self.learned, self.penalty, self.telling = model, learned, penalty, telling
        self.protocol, self.seed, self.processes = protocol, seed, processes
        self.register_buffer("alphas_cumprod", alphas_cumprod, persistent=False)
        self.register_buffer("error", torch.zeros(()))  # of the last batch, without the penalty
        self.parameters_learned = list(dict.fromkeys([*learned.weights, *learned.ranges, *learned.generators]))
        self.average = moving_average(self.parameters_learned, protocol.average)
        self.count = 0  # iterations so far, of an interrupted training too

    def on_train_start(self) -> None:
        """Go on from a checkpoint, if Lightning has read one."""
        self.count = self.trainer.global_step

    def training_step(self, batch: Batch, _: int) -> None:
        """One iteration."""
        schedule: Any = self.lr_schedulers()
        self.step(self.optimizers(), batch)
        schedule.step()

    def step(self, optimizer: Any, batch: Batch) -> None:
        """One step of the optimiser, and what belongs to it."""
        self.set_gradients(optimizer, batch)
        optimizer.step()
        clamp_parameters(self.model)
        self.average.update_parameters(nn.ParameterList(self.parameters_learned))
        self.count += 1

    def set_gradients(self, optimizer: Any, batch: Batch) -> None:
        """Gradients of the loss, part by part of the batch; the penalty's come with those of the first part."""
        rows = len(batch.rows)
        parts = min(self.protocol.parts, rows)

        def part(number: int) -> list[Tensor]:
            torch.manual_seed(derive_seed(self.seed, "network", self.count, number))  # whoever computes the part
            optimizer.zero_grad()
            taken = Batch(*(field.tensor_split(parts)[number] for field in batch))
            error = self.loss(taken) * (len(taken.rows) / rows)
            self.manual_backward(error + (self.penalty() if number == 0 else 0.0))
            gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.parameters_learned]
            return [*gradients, error.detach()]

        self.error.copy_(set_gradients(self.parameters_learned, parts, self.processes, part))

    def loss(self, batch: Batch) -> Tensor:
        """The error of the predicted noise for some rows."""
        x = noisy(batch.clean, batch.noise, batch.t, self.alphas_cumprod)
        conditions = self.telling(batch.rows, batch.told, self.device)
        predicted = noise_of(self.model(x, batch.t, outside="nearest_step", **conditions).sample, x)
        return loss(predicted, batch.noise, self.protocol.loss)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Bound the gradient, which no longer has the scale of half precision."""
        if self.protocol.clip is not None:
            nn.utils.clip_grad_norm_(self.parameters_learned, self.protocol.clip)

    def configure_optimizers(self) -> Any:
        """AdamW with settings for every kind of parameter, under a learning rate that rises and then stays."""
        protocol, groups = self.protocol, []
        settings = (
            (self.learned.weights, protocol.learning_rate, protocol.weight_decay),
            (self.learned.ranges, protocol.learning_rate * protocol.range_rate, 0.0),
            (self.learned.generators, protocol.learning_rate, protocol.weight_decay),
        )
        for parameters, rate, decay in settings:
            if parameters:
                groups.append({"params": list(dict.fromkeys(parameters)), "lr": rate, "weight_decay": decay})
        # a fused step takes half precision's scale off the gradient itself, after it was clipped
        half = protocol.precision == "16-mixed"
        optimizer = torch.optim.AdamW(groups, foreach=half, fused=not half)
        first, rises = (protocol.first_rate, protocol.warmup) if protocol.warmup else (1.0, 1)
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, first, total_iters=rises)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

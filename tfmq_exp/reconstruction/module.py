"""The LightningModule that reconstructs a unit: its rounding, its activation scales, or both."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.optim.adam import adam
from torch.utils import _pytree as pytree

from tfmq_exp.core.distributed import ALONE, ProcessGroup, summed_gradients
from tfmq_exp.core.precision import Precision, products_in
from tfmq_exp.core.seeds import derive_seed, seed_draws
from tfmq_exp.core.validate import AMOUNT, COUNT, RATE, check_fields, instance_of, one_of, optional
from tfmq_exp.quant.rounding import AdaRound, JointRounding, penalty_gradient
from tfmq_exp.quant.scales.base import ScaleProvider
from tfmq_exp.quant.timestep_context import TimestepContext
from tfmq_exp.reconstruction.activation_cache import TensorTree
from tfmq_exp.reconstruction.cache_format import FORMATS, CacheFormat
from tfmq_exp.reconstruction.capture import call_unit
from tfmq_exp.reconstruction.closed_form import GPTQConfig
from tfmq_exp.reconstruction.early_stop import EarlyStop
from tfmq_exp.reconstruction.objectives import Annealing, Objective
from tfmq_exp.reconstruction.random_batches import Rows, load_batches
from tfmq_exp.reconstruction.units import UnitInputs

LEARNING_PRECISIONS = ("float32", "tf32", "bfloat16")


@dataclass(frozen=True)
class LearnRounding:
    """Learning of the rounding of weights by AdaRound (arXiv 2004.10568): Adam on the rounding variables V.

    `penalty_weight` is that of AdaRound's penalty against the output error, `annealing` the penalty's exponent.
    """

    learning_rate: float
    penalty_weight: float
    annealing: Annealing

    def __post_init__(self) -> None:
        check_fields(self, learning_rate=RATE, penalty_weight=AMOUNT)


@dataclass(frozen=True)
class LearnScales:
    """Learning of activation scales: Adam, its learning rate falling to 0 along a cosine."""

    learning_rate: float

    def __post_init__(self) -> None:
        check_fields(self, learning_rate=RATE)


@dataclass(frozen=True)
class ReconstructionConfig:
    """Hyperparameters of the reconstruction of a unit. The papers' numbers are in conf/."""

    iterations: int  # optimiser steps per unit
    batch: int  # samples per step
    objective: Objective  # error of the unit's outputs
    inputs: UnitInputs  # networks whose inputs it learns on
    rounding: LearnRounding | None = None  # how the rounding of weights is learned, if it is
    scales: LearnScales | None = None  # how activation scales are learned, if they are
    gptq: GPTQConfig | None = None  # how weights are rounded in closed form, from where learning starts if it does
    early_stop: EarlyStop | None = None  # when a unit may end before its last iteration; None: never
    # microbatches of a batch, which processes share. Results depend on their number in the last bits, and not on the
    # number of processes.
    parts: int = 1
    cache: CacheFormat = "float32"  # in which a unit's inputs and outputs over the calibration set are stored
    precision: Precision = "float32"  # of the unit's products; float16 would need scaled losses

    def __post_init__(self) -> None:
        check_fields(self, iterations=COUNT, batch=COUNT, parts=COUNT)
        check_fields(self, cache=one_of(*FORMATS), precision=one_of(*LEARNING_PRECISIONS))
        check_fields(self, rounding=optional(instance_of(LearnRounding)), scales=optional(instance_of(LearnScales)))
        if self.parts > self.batch:
            raise ValueError(f"a batch of {self.batch} can have 1 to {self.batch} parts, got {self.parts}")
        check_fields(self, gptq=optional(instance_of(GPTQConfig)), early_stop=optional(instance_of(EarlyStop)))
        if not (self.rounds or self.scales):
            raise ValueError(
                "a recipe rounds weights (rounding, gptq), learns activation scales, or both; this one neither"
            )

    @property
    def rounds(self) -> bool:
        """Whether weights become integers."""
        return self.rounding is not None or self.gptq is not None

    @property
    def learns(self) -> bool:
        """Whether anything is learned, after what is rounded in closed form."""
        return self.rounding is not None or self.scales is not None

    @property
    def learning_rates(self) -> dict[str, float]:
        """The learning rates, by their keys in a method's phase."""
        learned = {"rounding": self.rounding, "scales": self.scales}
        return {f"recipe.{name}.learning_rate": part.learning_rate for name, part in learned.items() if part}


class BlockReconstruction(pl.LightningModule):
    """Fits the outputs of a unit to those of the float unit (BRECQ: `block_reconstruction`).

    Loss: the objective summed over the unit's outputs, plus the weighted rounding penalty of its layers. Lightning gets the rows of
    a chunk of batches: an iteration of a small unit takes a few milliseconds, and Lightning's step would add a third to it.
    Every rank gets the same batches and computes the gradients of its microbatches.

    Args:
        unit: module of the quantized network.
        context: timesteps of the rows at hand.
        roundings: of the unit's weights, if they are learned.
        sources: of the unit's activation scales, if they are learned.
        samples: dict of `inputs`, `targets` and `importance` of all samples.
        config: how it learns.
        seed: of dropped elements.
        processes: ranks that share the microbatches.
    """

    def __init__(
        self,
        unit: nn.Module,
        context: TimestepContext,
        roundings: Sequence[AdaRound],
        sources: Sequence[ScaleProvider],
        samples: TensorTree,
        config: ReconstructionConfig,
        seed: int = 0,
        processes: ProcessGroup = ALONE,
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.optimizer = Adam()
        self.unit, self.context, self.samples, self.config = unit, context, samples, config
        self.sources, self.seed, self.processes = sources, seed, processes
        self.rounding = JointRounding(roundings) if roundings else None
        # tied quantizers share their parameters
        self.scale_parameters = list(dict.fromkeys(p for s in sources for p in s.trainable())) if config.scales else []
        self.learned = [*([self.rounding.v] if self.rounding else []), *self.scale_parameters]
        self.iteration = 0  # iterations so far
        self.error = torch.zeros(())  # of the last batch, without the penalty

    def transfer_batch_to_device(self, batch: list[Rows], *_: Any) -> list[Rows]:
        """Rows stay where the samples are."""
        return batch

    def training_step(self, batches: list[Rows], _: int) -> None:
        for batch in load_batches(self.samples.tensors, batches, self.device):
            self.iterate(batch)

    def on_train_end(self) -> None:
        """Let go of the samples: Lightning's trainer and its module refer to each other, and are collected late."""
        self.samples = TensorTree(())

    def iterate(self, batch: list[Tensor]) -> None:
        """One iteration."""
        share, config = self.iteration / self.config.iterations, self.config
        self.iteration += 1
        gradients = self.gradients(batch)
        if self.rounding and config.rounding:
            self.optimizer.step([self.rounding.v], gradients[:1], config.rounding.learning_rate)
            self.rounding.update()
        if self.scale_parameters and config.scales:
            rate = config.scales.learning_rate * (0.5 * (1 + math.cos(math.pi * share)))
            self.optimizer.step(self.scale_parameters, gradients[-len(self.scale_parameters) :], rate)
        for source in self.sources:
            source.clamp_parameters()

    def gradients(self, batch: list[Tensor]) -> list[Tensor]:
        """Gradients of what is learned: of the error, summed over microbatches, and of the penalty."""
        rows = len(batch[0])
        count = min(self.config.parts, rows)
        leaves = [*(self.rounding.weights if self.rounding else []), *self.scale_parameters]

        def compute(index: int) -> list[Tensor]:
            seed_draws(batch[0].device, derive_seed(self.seed, self.iteration, index))  # the same draws on any rank
            microbatch = [x.tensor_split(count)[index] for x in batch]
            with products_in(self.config.precision, batch[0].device):
                outputs, losses, slopes = self.losses(microbatch)
                learned = [i for i, x in enumerate(outputs) if x.requires_grad]
                ends = [outputs[i] for i in learned], leaves, [slopes[i] for i in learned]
                terms = [*torch.autograd.grad(*ends, materialize_grads=True), torch.stack([*losses]).sum()]
            return terms if count == 1 else [x * (len(microbatch[0]) / rows) for x in terms]

        total = summed_gradients(leaves, count, self.processes, compute)
        sizes = [parameter.numel() for parameter in self.learned]
        gradients = [part.view_as(p) for part, p in zip(total.split([*sizes, 1]), self.learned, strict=False)]
        if self.rounding:
            gradients[0] = self.rounding.gradient(gradients[0], self.penalty_gradient())
        self.error = total[-1]
        return gradients

    def losses(self, batch: list[Tensor]) -> tuple[Sequence[Tensor], ...]:
        """The unit's outputs for some rows, the error of each, and its gradient to the output; without the penalty."""
        data = self.samples.structure(batch)
        result = call_unit(self.unit, self.context, self.config.inputs.combine(data["inputs"]))
        (
            outputs,
            targets,
        ) = (  # of several streams, one may be missing: the text's in the last block of a joint transformer
            [leaf for leaf in pytree.tree_leaves(tree) if leaf is not None] for tree in (result, data["targets"])
        )
        importance = [None] * len(targets) if data["importance"] is None else pytree.tree_leaves(data["importance"])
        triples = zip(outputs, targets, importance, strict=True)
        return outputs, *zip(*(self.config.objective.loss(*triple) for triple in triples), strict=True)

    def penalty_gradient(self) -> Tensor | None:
        """Gradient of the weighted rounding penalty to h; None while it is off."""
        config, iterations = self.config.rounding, self.config.iterations
        if self.rounding is None or config is None or not config.annealing.active(self.iteration, iterations):
            return None
        beta = config.annealing.beta(self.iteration, iterations)
        return penalty_gradient(self.rounding.h, beta).mul_(config.penalty_weight)

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        """None of Lightning's: `iterate` takes the steps."""
        return []


class Adam:
    """Adam (arXiv 1412.6980) with torch's defaults, by its fused kernel alone.

    `torch.optim.Adam.step` also looks for accelerators, each time, which takes a twentieth of a small unit's iteration.
    """

    def __init__(self) -> None:
        self.state: dict[Tensor, tuple[Tensor, Tensor, Tensor]] = {}  # two moments and the count of a parameter's steps

    @torch.no_grad()
    def step(self, parameters: Sequence[Tensor], gradients: Sequence[Tensor], lr: float) -> None:
        """Change the parameters by one step at this learning rate."""
        for x in parameters:
            if x not in self.state:
                self.state[x] = torch.zeros_like(x), torch.zeros_like(x), torch.zeros((), device=x.device)
        first, second, steps = ([self.state[x][i] for x in parameters] for i in range(3))
        settings: dict[str, Any] = {"beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.0}
        settings |= {"amsgrad": False, "maximize": False, "fused": True}
        adam(list(parameters), list(gradients), first, second, [], steps, lr=lr, **settings)

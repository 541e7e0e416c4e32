"""One LightningModule reconstructs every kind of unit, whatever is learned in it."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from tfmq_exp.core.distributed import ALONE, ProcessGroup
from tfmq_exp.core.seeds import derive_seed
from tfmq_exp.core.validate import AMOUNT, COUNT, RATE, check_fields, instance_of, optional
from tfmq_exp.quant.rounding import AdaRound, rounding_penalty
from tfmq_exp.quant.scales.base import ScaleProvider
from tfmq_exp.quant.timestep_context import TimestepContext
from tfmq_exp.reconstruction.capture import call
from tfmq_exp.reconstruction.gradients import set_gradients
from tfmq_exp.reconstruction.inputs import UnitInputs
from tfmq_exp.reconstruction.objectives import Annealing, Objective


@dataclass(frozen=True)
class LearnRounding:
    """AdaRound's share of a recipe.

    Args:
        learning_rate: of Adam on the rounding variables V.
        penalty_weight: weight of AdaRound's penalty against the output error.
        annealing: the penalty's exponent over time.
    """

    learning_rate: float
    penalty_weight: float
    annealing: Annealing

    def __post_init__(self) -> None:
        check_fields(self, learning_rate=RATE, penalty_weight=AMOUNT)


@dataclass(frozen=True)
class LearnScales:
    """The activation sources' share of a recipe: Adam, its rate falling to 0 along a cosine."""

    learning_rate: float

    def __post_init__(self) -> None:
        check_fields(self, learning_rate=RATE)

    def rate(self, done: float) -> float:
        """Share of the learning rate after a share of the iterations."""
        return 0.5 * (1 + math.cos(math.pi * done))


@dataclass(frozen=True)
class ReconstructionConfig:
    """How one unit learns. The papers' numbers live in conf/.

    Args:
        iterations: optimiser steps per unit.
        batch: samples per step.
        objective: error of the unit's outputs.
        inputs: what it is fed.
        rounding: how the rounding of weights is learned, if it is.
        scales: how activation scales are learned, if they are.
        parts: how many parts a batch is computed in. Processes share them; results depend on them in the last bits, and
            not on the processes.
    """

    iterations: int
    batch: int
    objective: Objective
    inputs: UnitInputs
    rounding: LearnRounding | None = None
    scales: LearnScales | None = None
    parts: int = 1

    def __post_init__(self) -> None:
        check_fields(self, iterations=COUNT, batch=COUNT, parts=COUNT)
        check_fields(self, rounding=optional(instance_of(LearnRounding)), scales=optional(instance_of(LearnScales)))
        if self.parts > self.batch:
            raise ValueError(f"a batch of {self.batch} can have 1 to {self.batch} parts, got {self.parts}")
        if self.rounding is None and self.scales is None:
            raise ValueError("a recipe learns the rounding of weights, activation scales, or both; this one neither")

    @property
    def rates(self) -> dict[str, float]:
        """The learning rates, by their place in a method's part."""
        parts = {"rounding": self.rounding, "scales": self.scales}
        return {f"recipe.{name}.learning_rate": part.learning_rate for name, part in parts.items() if part}


class BlockReconstruction(pl.LightningModule):
    """Fit the outputs of a unit to those of the float unit, by its rounding variables, its activation scales, or both.

    Loss: the objective summed over the unit's outputs, plus the weighted rounding penalty of all its layers. A batch is what
    `arrange` turns into inputs, targets and importance. Lightning is handed several batches at a time: an iteration of a
    small unit takes a few milliseconds, and Lightning's own work per step would be a tenth of it. Each process is handed the
    same batches and computes the gradients of its parts of them.
    """

    def __init__(
        self,
        unit: nn.Module,
        context: TimestepContext,
        roundings: Sequence[AdaRound],
        sources: Sequence[ScaleProvider],
        arrange: Callable[[list[Tensor]], Any],
        recipe: ReconstructionConfig,
        seed: int = 0,
        processes: ProcessGroup = ALONE,
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.unit, self.context, self.arrange, self.recipe = unit, context, arrange, recipe
        self.roundings, self.sources = roundings, sources
        self.seed, self.processes = seed, processes
        self.count = 0  # iterations so far
        self.error = torch.zeros(())  # of the last batch, without the penalty

    def training_step(self, batches: list[list[Tensor]], _: int) -> None:
        """One optimiser step for each batch."""
        optimizer: Any = self.optimizers(use_pl_optimizer=False)
        for batch in batches:
            self.iterate(optimizer, batch)

    def iterate(self, optimizer: torch.optim.Optimizer, batch: list[Tensor]) -> None:
        """One optimiser step."""
        self.set_rates(optimizer)
        self.count += 1
        self.set_gradients(batch)
        optimizer.step()
        for source in self.sources:
            source.clamp_parameters()

    def set_gradients(self, batch: list[Tensor]) -> None:
        """Gradients of the error, part by part of the batch; the penalty's come with those of the first part."""
        learned, rows = self.learned(), len(batch[0])
        parts = min(self.recipe.parts, rows)

        def part(number: int) -> list[Tensor]:
            torch.manual_seed(
                derive_seed(self.seed, self.count, number)
            )  # of what is random, whoever computes the part
            taken = [x.tensor_split(parts)[number] for x in batch]
            error = self.loss(taken) * (len(taken[0]) / rows)
            penalty = self.penalty() if number == 0 else 0.0
            return [*torch.autograd.grad(error + penalty, learned, materialize_grads=True), error.detach()]

        self.error = set_gradients(learned, parts, self.processes, part)

    def loss(self, batch: list[Tensor]) -> Tensor:
        """The error of the outputs for some rows, without the penalty."""
        data = self.arrange(batch)
        outputs = call(self.unit, self.context, self.recipe.inputs.combine(data["fed"]))
        wanted = pytree.tree_leaves(data["wanted"])
        importance = [None] * len(wanted) if data["importance"] is None else pytree.tree_leaves(data["importance"])
        triples = zip(pytree.tree_leaves(outputs), wanted, importance, strict=True)
        return torch.stack([self.recipe.objective.loss(*triple) for triple in triples]).sum()

    def penalty(self) -> Tensor | float:
        """The weighted rounding penalty, 0 while it is off. It uses what the last forward pass has left."""
        learning = self.recipe.rounding
        if learning is None or not learning.annealing.active(self.count, self.recipe.iterations):
            return 0.0
        beta = learning.annealing.beta(self.count, self.recipe.iterations)
        together = torch.cat([rounding.h.flatten() for rounding in self.roundings])
        return learning.penalty_weight * rounding_penalty(together, beta)

    def learned(self) -> list[nn.Parameter]:
        """Everything that is learned."""
        sources = (
            [parameter for source in self.sources for parameter in source.trainable()] if self.recipe.scales else []
        )
        return list(dict.fromkeys([*(rounding.v for rounding in self.roundings), *sources]))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Adam on every V and every parameter of a source, each kind with its own rate."""
        groups: list[dict[str, Any]] = []
        if self.recipe.rounding and self.roundings:
            params = [rounding.v for rounding in self.roundings]
            groups.append({"params": params, "lr": self.recipe.rounding.learning_rate})
        if self.recipe.scales and self.sources:
            params = dict.fromkeys(parameter for source in self.sources for parameter in source.trainable())
            groups.append({"params": list(params), "lr": self.recipe.scales.learning_rate, "scales": True})
        return torch.optim.Adam(groups, fused=True)

    def set_rates(self, optimizer: torch.optim.Optimizer) -> None:
        """Move the rates of the scales along their cosine."""
        scales = self.recipe.scales
        for group in optimizer.param_groups:
            if scales and group.get("scales"):
                group["lr"] = scales.learning_rate * scales.rate(self.count / self.recipe.iterations)

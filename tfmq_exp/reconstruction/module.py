"""One LightningModule reconstructs every kind of unit."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from tfmq_exp.quant.rounding import AdaRound, rounding_penalty
from tfmq_exp.reconstruction.objectives import Annealing, channel_dim, lp_loss


@dataclass(frozen=True)
class Recipe:
    """How one unit's rounding is learned. The papers' numbers live in conf/.

    Args:
        iterations: optimiser steps per unit.
        batch: samples per step.
        learning_rate: of Adam on the rounding variables V.
        p: norm of the output error.
        penalty_weight: weight of AdaRound's penalty against the output error.
        annealing: its exponent over time.
    """

    iterations: int
    batch: int
    learning_rate: float
    p: float
    penalty_weight: float
    annealing: Annealing

    def __post_init__(self) -> None:
        if self.iterations < 1 or self.batch < 1:
            raise ValueError(f"iterations and batch must be at least 1, got {self.iterations} and {self.batch}")


class BlockReconstruction(pl.LightningModule):
    """Fit the outputs of a unit with soft rounding to those of the float unit.

    Loss: sum over the unit's outputs of `lp_loss`, plus the weighted rounding penalty of all its layers. A batch is what
    `arrange` turns into ((args, kwargs), targets). Lightning is handed several batches at a time: an iteration of a small
    unit takes a few milliseconds, and Lightning's own work per step would be a tenth of it.
    """

    def __init__(
        self,
        unit: nn.Module,
        roundings: list[AdaRound],
        arrange: Callable[[list[Tensor]], tuple[Any, Any]],
        recipe: Recipe,
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.unit, self.arrange, self.recipe, self.learned = unit, arrange, recipe, roundings
        self.count = 0  # iterations so far
        self.error = torch.zeros(())  # of the last batch, without the penalty

    def training_step(self, batches: list[list[Tensor]], _: int) -> None:
        """One optimiser step for each batch."""
        optimizer: Any = self.optimizers(use_pl_optimizer=False)
        for batch in batches:
            self.count += 1
            optimizer.zero_grad()
            self.loss(batch).backward()
            optimizer.step()

    def loss(self, batch: list[Tensor]) -> Tensor:
        """What is minimised, for one batch."""
        (args, kwargs), targets = self.arrange(batch)
        outputs = pytree.tree_leaves(self.unit(*args, **kwargs))
        pairs = zip(outputs, pytree.tree_leaves(targets), strict=True)
        loss = torch.stack([lp_loss(out, want, self.recipe.p, channel_dim(want)) for out, want in pairs]).sum()
        self.error = loss.detach()
        if not self.recipe.annealing.active(self.count, self.recipe.iterations):
            return loss
        beta = self.recipe.annealing.beta(self.count, self.recipe.iterations)
        together = torch.cat([rounding.h.flatten() for rounding in self.learned])
        return loss + self.recipe.penalty_weight * rounding_penalty(together, beta)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Adam on every V."""
        return torch.optim.Adam([rounding.v for rounding in self.learned], lr=self.recipe.learning_rate, fused=True)

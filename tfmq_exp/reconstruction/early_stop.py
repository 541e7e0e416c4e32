"""Early stop of a unit's learning: once its rounding has settled and samples that were held back gain no more."""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import pytorch_lightning as pl
import torch

from tfmq_exp.core.validate import COUNT, DECAY, SHARE, Checked
from tfmq_exp.reconstruction.random_batches import Rows, load_batches

if TYPE_CHECKING:
    from tfmq_exp.reconstruction.module import BlockReconstruction


@dataclass(frozen=True)
class EarlyStop(Checked):
    """Rule by which the learning of a unit may end before its last iteration."""

    # share of the samples; none of a unit that reads timesteps alone, all of which it serves
    held_out: Annotated[float, DECAY] = 0.1
    every: Annotated[int, COUNT] = 50  # iterations between two checks, which come at the end of Lightning's steps
    checks: Annotated[int, COUNT] = 3  # without a lower error
    undecided: Annotated[float, SHARE] = 0.001  # of the weights; nothing is measured while more have yet to be decided

    def split(self, samples: int, seed: int, *, hold_back: bool) -> tuple[Rows, Rows]:
        """Rows to learn on, and rows that the error is measured on: some of their own, or the same."""
        rows = torch.randperm(samples, generator=torch.Generator().manual_seed(seed))
        held = min(round(self.held_out * samples), samples - 1) if hold_back else 0
        return (rows[held:].sort().values, rows[:held]) if held else (torch.arange(samples), rows)


class StopOnceSettled(pl.Callback):
    """Stops Lightning's trainer of a unit by the rule of an `EarlyStop`."""

    def __init__(self, rule: EarlyStop, task: "BlockReconstruction", rows: Rows) -> None:
        self.rule, self.task, self.rows = rule, task, rows
        self.done, self.best, self.worse = 0, math.inf, 0

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        """Check, where enough iterations have passed since the last time."""
        task = self.task
        if task.iteration < (self.done + 1) * self.rule.every:
            return
        self.done += 1
        if task.rounding and float(task.rounding.undecided) > self.rule.undecided:
            return
        error = self.error()
        self.best, self.worse = (error, 0) if error < self.best else (self.best, self.worse + 1)
        trainer.should_stop = self.worse >= self.rule.checks

    @torch.no_grad()
    def error(self) -> float:
        """Error of the unit's outputs on the rows, as it learns it."""
        batches = load_batches(self.task.samples.tensors, self.rows.split(self.task.config.batch), self.task.device)
        errors = [torch.stack([*self.task.losses(batch)[1]]).sum() * len(batch[0]) for batch in batches]
        return float(torch.stack(errors).sum()) / len(self.rows)

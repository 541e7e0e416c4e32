"""What is known and kept of a unit that learns, and who is told."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import pytorch_lightning as pl
from torch import Tensor

from tfmq_exp.core.finite import DivergedError
from tfmq_exp.quant.layers import QuantizedWeight
from tfmq_exp.reconstruction.module import BlockReconstruction


@dataclass(frozen=True)
class UnitReport:
    """What learning one unit did. Errors are of its outputs, relative to their variance, on part of the calibration set."""

    unit: str
    kind: str
    layers: int
    weights: int
    error_before: float
    error_after: float
    seconds: float
    peak_mib: float


class UnitResult(NamedTuple):
    """What a unit has learned: integers of its weights by site, and the state of its activation quantizers by name."""

    integers: Mapping[str, tuple[QuantizedWeight, ...]]
    activations: Mapping[str, Tensor]


class UnitCheckpointer(Protocol):
    """Keeps finished units, so that an interrupted run goes on after the last of them."""

    def get(self, unit: str) -> UnitResult | None:
        """What a finished unit has learned, or None."""
        ...

    def put(self, unit: str, learned: UnitResult, report: UnitReport) -> None:
        """Keep a unit that has just been learned."""
        ...

    def part(self, name: str) -> "UnitCheckpointer":
        """A keeper of its own for work that goes over the same units again."""
        ...


class ProgressCallback(Protocol):
    """Is told how the work goes."""

    def start(self, units: int) -> None:
        """Before the first unit."""
        ...

    def progress(self, what: str, number: int, of: int) -> None:
        """During work that has no units and no loss."""
        ...

    def iteration(self, unit: str, number: int, of: int, loss: float) -> None:
        """After some iterations of a unit."""
        ...

    def finished(self, unit: str, report: UnitReport | None) -> None:
        """After a unit; without a report if it was finished before."""
        ...


class LossCallback(pl.Callback):
    """Tells the watcher about the loss, and ends the learning of a unit whose loss is not finite any more."""

    def __init__(self, watcher: ProgressCallback, unit: str, iterations: int) -> None:
        self.watcher, self.unit, self.iterations = watcher, unit, iterations

    def on_train_batch_end(self, trainer: pl.Trainer, module: pl.LightningModule, *_: Any) -> None:
        """After some iterations."""
        assert isinstance(module, BlockReconstruction)
        loss = float(module.error)
        if not math.isfinite(loss):
            raise DivergedError(f"the unit {self.unit}", module.count, self.iterations, loss, module.recipe.rates)
        self.watcher.iteration(self.unit, module.count, self.iterations, loss)

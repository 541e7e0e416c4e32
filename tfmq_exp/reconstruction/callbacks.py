"""Results and reports of units, and the protocols of what saves them and follows the work."""

import math
import resource
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
    """Effect of learning one unit. Errors are of its outputs, relative to their variance, on part of the calibration set."""

    unit: str
    kind: str
    layers: int
    weights: int
    error_before: float
    error_after: float
    seconds: float
    peak_mib: float


class UnitResult(NamedTuple):
    """Result of a unit: integer weights by layer, and the state of its activation quantizers by name."""

    integers: Mapping[str, tuple[QuantizedWeight, ...]]
    activations: Mapping[str, Tensor]


class UnitCheckpointer(Protocol):
    """Saves finished units, so that an interrupted run resumes after the last of them."""

    def get(self, unit: str) -> UnitResult | None: ...

    def put(self, unit: str, learned: UnitResult, report: UnitReport) -> None: ...

    def scoped(self, name: str) -> "UnitCheckpointer":
        """A checkpointer of its own for another pass over the same units."""
        ...


class ProgressCallback(Protocol):
    """Follows the work of a phase."""

    def on_start(self, units: int) -> None: ...

    def on_progress(self, name: str, done: int, total: int) -> None:
        """Called during work without units and losses."""
        ...

    def on_iteration_end(self, unit: str, iteration: int, iterations: int, loss: float) -> None:
        """Called after iteration `iteration` of `iterations`, from 1, with its loss without the rounding penalty."""
        ...

    def on_unit_end(self, unit: str, report: UnitReport | None) -> None:
        """Called after a unit; without a report if an earlier run had finished it."""
        ...


class LossCallback(pl.Callback):
    """Passes the loss of a unit on, and raises `DivergedError` once it is not finite."""

    def __init__(self, progress: ProgressCallback, unit: str) -> None:
        self.progress, self.unit = progress, unit

    def on_train_batch_end(self, trainer: pl.Trainer, module: pl.LightningModule, *_: Any) -> None:
        assert isinstance(module, BlockReconstruction)
        loss, config = float(module.error), module.config
        if not math.isfinite(loss):
            raise DivergedError(
                f"the unit {self.unit}", module.iteration, config.iterations, loss, config.learning_rates
            )
        self.progress.on_iteration_end(self.unit, module.iteration, config.iterations, loss)


def peak_memory_mib() -> float:
    """Largest resident memory of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

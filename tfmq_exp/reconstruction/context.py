"""Context of a phase of a method: networks, data, resources, and what saves and follows its results."""

import functools
import resource
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple, Protocol

import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from tfmq_exp.calibration.dataset import CalibrationSet
from tfmq_exp.core.distributed import ALONE, ProcessGroup
from tfmq_exp.denoisers.structure import NetworkStructure
from tfmq_exp.quant.layers import QuantizedWeight
from tfmq_exp.reconstruction.activation_cache import CPU, SpillAllocator
from tfmq_exp.reconstruction.blocks.stored_weights import StoredWeights
from tfmq_exp.reconstruction.cache_format import CacheFormat
from tfmq_exp.surgery.quantized_network import QuantizedNetwork


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


@dataclass(frozen=True)
class ComputeConfig:
    """Resources of one process."""

    batch: int  # samples of a forward pass
    cache_bytes: int  # memory for cached activations of this process, beside the device's
    trainer: Callable[..., pl.Trainer]  # keyword arguments -> a Lightning trainer
    cache_folder: Path | None = None  # place of activations beyond that (default: the system's temporary folder)
    processes: ProcessGroup = ALONE  # ranks that share the work
    checkpoint_every: timedelta = timedelta(minutes=5)  # time that a killed training may have to repeat
    device: torch.device = CPU  # of the networks
    device_cache_bytes: int = 0  # the device's memory for cached activations

    def storage(self, share: int = 1, form: CacheFormat = "float32", *, of_device: float = 0.0) -> SpillAllocator:
        """An allocator with 1 / `share` of the cache in memory, after a part `of_device` of the device's, 0 to 1."""
        device_bytes = int(of_device * self.device_cache_bytes)
        return SpillAllocator(self.cache_bytes // share, self.cache_folder, self.device, device_bytes, form)


@dataclass(frozen=True)
class ReconstructionContext:
    """Everything that a phase of a method takes."""

    model: QuantizedNetwork  # the network that is being quantized
    float_network: nn.Module  # the network whose outputs it learns to return
    structure: NetworkStructure  # layers and blocks of both
    data: CalibrationSet  # calibration samples
    compute: ComputeConfig  # resources
    seed: int  # of all random numbers
    checkpointer: UnitCheckpointer  # saves finished units
    progress: ProgressCallback  # follows the work
    stored: StoredWeights | None = None  # sources of the weights; None: both networks are in memory


def quiet_trainer(device: torch.device) -> Callable[..., pl.Trainer]:
    """Trainers for one device that log, save and print nothing, for the many units."""
    return functools.partial(
        pl.Trainer,
        accelerator="gpu" if device.type == "cuda" else "cpu",
        devices=1 if device.index is None else [device.index],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )


def peak_memory_mib() -> float:
    """Largest resident memory of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

"""Context of a phase of a method: networks, data, and the resources that it may use."""

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path

import pytorch_lightning as pl
import torch
from torch import nn

from tfmq_exp.calibration.dataset import CalibrationSet
from tfmq_exp.core.distributed import ALONE, ProcessGroup
from tfmq_exp.denoisers.structure import UNetStructure
from tfmq_exp.reconstruction.activation_cache import SpillAllocator
from tfmq_exp.reconstruction.callbacks import ProgressCallback, UnitCheckpointer
from tfmq_exp.surgery.quantized_unet import QuantizedUNet


@dataclass(frozen=True)
class ComputeConfig:
    """Resources of one process.

    Args:
        batch: samples of a forward pass.
        cache_bytes: memory for cached activations of this process.
        trainer: keyword arguments -> a Lightning trainer.
        cache_folder: place of activations beyond that (default: the system's temporary folder).
        processes: ranks that share the work.
        checkpoint_every: time that a killed training may have to repeat.
    """

    batch: int
    cache_bytes: int
    trainer: Callable[..., pl.Trainer]
    cache_folder: Path | None = None
    processes: ProcessGroup = ALONE
    checkpoint_every: timedelta = timedelta(minutes=5)

    def storage(self, share: int = 1) -> SpillAllocator:
        """An allocator with 1 / `share` of the cache."""
        return SpillAllocator(self.cache_bytes // share, self.cache_folder)


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


@dataclass(frozen=True)
class ReconstructionContext:
    """Everything that a phase of a method takes.

    Args:
        model: the network that is being quantized.
        float_unet: the network whose outputs it learns to return.
        structure: layers and blocks of both.
        data: calibration samples.
        compute: resources.
        seed: of all random numbers.
        checkpointer: saves finished units.
        progress: follows the work.
    """

    model: QuantizedUNet
    float_unet: nn.Module
    structure: UNetStructure
    data: CalibrationSet
    compute: ComputeConfig
    seed: int
    checkpointer: UnitCheckpointer
    progress: ProgressCallback

    def on(self, data: CalibrationSet) -> "ReconstructionContext":
        """The same with other samples."""
        return replace(self, data=data)

"""Readers of one file, opened for one call."""

from pathlib import Path

from torch import Tensor

from tfmq_exp.denoisers.loading.checkpoint import Checkpoint


def tensor_names(path: Path) -> list[str]:
    with Checkpoint(path) as file:
        return file.names()


def read_weights(path: Path, prefix: str, ema: bool) -> dict[str, Tensor]:
    with Checkpoint(path) as file:
        return file.read(prefix, ema=ema)

"""Checkpoint files of tests, and readers that open a file for one call."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tfmq_exp.denoisers.loading.checkpoint import Checkpoint, read_tensors

FORMATS = pytest.mark.parametrize("is_zip", [True, False], ids=["zip", "legacy"])


def tensor_names(path: Path) -> list[str]:
    with Checkpoint(path) as file:
        return file.names()


def read_weights(path: Path, prefix: str, ema: bool) -> dict[str, Tensor]:
    with Checkpoint(path) as file:
        return file.read(prefix, ema=ema)


def save(value: Any, path: Path, is_zip: bool = True, protocol: int = 2) -> Path:
    torch.save(value, path, _use_new_zipfile_serialization=is_zip, pickle_protocol=protocol)
    return path


def equal(a: Tensor, b: Tensor) -> bool:
    same = a.shape == b.shape and a.dtype == b.dtype
    return same and a.contiguous().reshape(-1).view(torch.uint8).equal(b.contiguous().reshape(-1).view(torch.uint8))


def message(path: Path) -> str:
    with pytest.raises(ValueError, match=r"\S") as caught:
        read_tensors(path)
    text = str(caught.value)
    assert text.startswith(f"{path}: ")
    assert "\n" not in text
    return text

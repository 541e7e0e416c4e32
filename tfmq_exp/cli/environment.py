"""The machine: device, threads, versions, state of the source tree."""

import importlib.metadata
import logging
import os
import platform
import subprocess
import sys
import warnings
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

PACKAGES = ("torch", "diffusers", "pytorch-lightning", "torchmetrics", "hydra-core", "numpy", "safetensors")


def pick_device(device: str, rank: int = 0) -> torch.device:
    """The device for the key `device`, of a process that has a GPU of its own: auto takes CUDA where there is one.

    Raises:
        ValueError: a device that is unknown or absent.
    """
    if device not in ("auto", "cpu", "cuda"):
        raise ValueError(f"device must be auto, cpu or cuda, got {device!r}")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device=cuda was asked for, but torch sees no CUDA device; use device=cpu or device=auto")
    if device == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    if rank >= (count := torch.cuda.device_count()):
        raise ValueError(f"process {rank} has no GPU: torch sees {count}; set runtime.processes to that")
    return torch.device("cuda", rank)


def prepare(threads: int | None) -> None:
    """Set up the process: threads, exact float32 products, quiet libraries."""
    if threads is not None:
        torch.set_num_threads(threads)
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    for name in ("pytorch_lightning", "lightning.pytorch", "lightning_fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module=r"pytorch_lightning\..*")


def describe_environment(device: torch.device) -> dict[str, Any]:
    """Software, device and command of a result, for its record."""
    return {
        "python": platform.python_version(),
        "machine": platform.machine(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
        "git": git_state(),
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
    }


def git_state() -> str:
    """The commit of the source tree, marked when files differ from it; `unknown` outside a repository."""
    words = ["git", "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty=+changes"]
    options: dict[str, Any] = {"env": {**os.environ, "GIT_OPTIONAL_LOCKS": "0"}, "cwd": Path(__file__).parents[2]}
    with suppress(OSError, subprocess.CalledProcessError):
        return subprocess.run(words, check=True, capture_output=True, text=True, **options).stdout.strip()
    return "unknown"

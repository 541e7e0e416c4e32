"""The machine: device, threads, versions, state of the source tree."""

import importlib.metadata
import logging
import os
import platform
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import torch

PACKAGES = ("torch", "diffusers", "pytorch-lightning", "torchmetrics", "hydra-core", "numpy", "safetensors")


def pick_device(device: str, rank: int = 0) -> torch.device:
    """The device for the key `device`: auto takes CUDA where there is one.

    Args:
        device: auto, cpu or cuda.
        rank: of the process; each has a GPU of its own.

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


def busy() -> str:
    """Remark on measured times, empty unless more processes want to run than the machine has cores."""
    load, cores = os.getloadavg()[0], len(os.sched_getaffinity(0))
    if load <= cores + 0.5:
        return ""
    return f"measured on a busy machine (load {load:.1f} on {cores} cores): it will be faster when others are done"


def git_state() -> str:
    """The commit of the source tree, marked when files differ from it; `unknown` outside a repository."""

    def git(*words: str) -> str:
        options: dict[str, Any] = {"env": {**os.environ, "GIT_OPTIONAL_LOCKS": "0"}, "cwd": Path(__file__).parents[2]}
        return subprocess.run(["git", *words], check=True, capture_output=True, text=True, **options).stdout.strip()

    try:
        commit = git("rev-parse", "HEAD")
        return f"{commit}+changes" if git("status", "--porcelain", "--untracked-files=no") else commit
    except (OSError, subprocess.CalledProcessError):
        return "unknown"

"""The machine: device, threads, versions, what git says. The only place that looks at it."""

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


def pick_device(accelerator: str, rank: int = 0) -> torch.device:
    """The device for `trainer.accelerator`: auto takes CUDA where there is one.

    Args:
        accelerator: auto, cpu or gpu.
        rank: of the process; each has a GPU of its own.

    Raises:
        ValueError: an accelerator that is unknown or absent.
    """
    if accelerator not in ("auto", "cpu", "gpu"):
        raise ValueError(f"trainer.accelerator must be auto, cpu or gpu, got {accelerator!r}")
    if accelerator == "gpu" and not torch.cuda.is_available():
        raise ValueError("trainer=gpu was asked for, but torch sees no CUDA device; use trainer=cpu or trainer=auto")
    if accelerator == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    if rank >= torch.cuda.device_count():
        raise ValueError(
            f"process {rank} has no GPU: torch sees {torch.cuda.device_count()}; set runtime.processes to that"
        )
    return torch.device("cuda", rank)


def prepare(threads: int | None) -> None:
    """Settings of the process: threads, exact float32 products, and libraries that talk too much."""
    if threads is not None:
        torch.set_num_threads(threads)
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    for name in ("pytorch_lightning", "lightning.pytorch", "lightning_fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module=r"pytorch_lightning\..*")


def describe_environment(device: torch.device) -> dict[str, Any]:
    """What a result needs to say about where it was made."""
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
    """A remark on what is measured now: empty unless more wants to run than the machine has cores for."""
    load, cores = os.getloadavg()[0], len(os.sched_getaffinity(0))
    if load <= cores + 0.5:
        return ""
    return f"measured on a busy machine (load {load:.1f} on {cores} cores): it will be faster when others are done"


def git_state() -> str:
    """The commit of the source tree, marked when files differ from it; `unknown` outside a repository."""
    root = Path(__file__).parents[2]
    try:
        commit = _git(root, "rev-parse", "HEAD")
        return f"{commit}+changes" if _git(root, "status", "--porcelain", "--untracked-files=no") else commit
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _git(root: Path, *words: str) -> str:
    environment = {**os.environ, "GIT_OPTIONAL_LOCKS": "0"}
    done = subprocess.run(["git", *words], cwd=root, check=True, capture_output=True, text=True, env=environment)
    return done.stdout.strip()

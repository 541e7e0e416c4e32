"""Weights of a network in one file with the names of its original program, as the community shares them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffusers.loaders.single_file_model import SINGLE_FILE_LOADABLE_CLASSES
from torch import Tensor

from tfmq_exp.core.file_kind import is_safetensors, why_missing
from tfmq_exp.denoisers.loading.checkpoint import read_tensors


def require_single_file(path: Path) -> Path:
    """The path of a safetensors file; FileNotFoundError, or ValueError for another format."""
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint at {path}{why_missing(path)}: expected a .safetensors file")
    if not is_safetensors(path):
        raise ValueError(f"{path} is no safetensors file: other formats are programs, and are not read")
    return path


def read_single_file(path: Path, network: Any) -> dict[str, Tensor]:
    """Read weights, by diffusers' names for this network: as they are, or renamed by diffusers' own functions.

    Only the file is read; the settings are the network's.

    Args:
        path: of a safetensors file: a checkpoint of Stable Diffusion 1, 2 or XL, SD3, FLUX and others.
        network: without weights.

    Raises:
        FileNotFoundError: no such file.
        ValueError: another format or network, or a class for which diffusers knows no other names.
    """
    state = read_tensors(require_single_file(path))
    if state.keys() == network.state_dict().keys():
        return state
    try:
        return renamed(state, network)
    except Exception as error:  # a checkpoint of another network fails in any way
        reason = str(error) if type(error) is ValueError else f"{type(error).__name__}: {error}"
        found = f"{path} holds no {type(network).__name__} of these settings"
        raise ValueError(f"{found}: {' '.join(reason.split())[:200]}") from error


def renamed(state: Mapping[str, Tensor], network: Any) -> dict[str, Tensor]:
    """Weights by diffusers' names for this network; ValueError for a class of which diffusers knows no other names, or no weights."""
    kind = type(network).__name__
    if kind not in SINGLE_FILE_LOADABLE_CLASSES:
        raise ValueError(f"diffusers converts no checkpoints of a {kind}")
    convert: Any = SINGLE_FILE_LOADABLE_CLASSES[kind]["checkpoint_mapping_fn"]
    if not (found := convert(checkpoint=dict(state), config=dict(network.config))):
        raise ValueError("it has no weights by the names that are known")
    return found

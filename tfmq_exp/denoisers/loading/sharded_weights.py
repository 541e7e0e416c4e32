"""Weights that are read from safetensors files when they are needed, tensor by tensor."""

from collections import Counter
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Self

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from tfmq_exp.core.file_kind import unreadable
from tfmq_exp.denoisers.loading.weight_files import weight_files

META = torch.device("meta")


class ShardedWeights:
    """Tensors of a network by name, in one safetensors file or in several; only those that are asked for are read.

    `files` is the file of each tensor; `reads` counts how often each was read; `device` is that of the network.
    """

    def __init__(self, files: Mapping[str, Path]) -> None:
        self.files, self.reads = dict(files), Counter[str]()
        self.device = torch.device("cpu")

    @classmethod
    def of(cls, folder: Path) -> Self:
        """The weights in a component's folder of diffusers' layout, see `weight_files`.

        Raises:
            FileNotFoundError: no weights, or not all shards.
            ValueError: weights that are no safetensors, a damaged file, a tensor that is in two of them.
        """
        files: dict[str, Path] = {}
        for path in weight_files(folder):
            if path.suffix != ".safetensors":
                raise ValueError(f"{path}: parts of a network can be read from .safetensors files alone")
            names = tensor_names(path)
            if twice := files.keys() & names:
                raise ValueError(f"{path}: {min(twice)} is in {files[min(twice)].name}, too")
            files |= dict.fromkeys(names, path)
        return cls(files)

    def read(self, names: Collection[str]) -> dict[str, Tensor]:
        """Copies of some tensors, so that no file stays open; ValueError for a name that no file has, or a damaged file."""
        if missing := set(names).difference(self.files):
            raise ValueError(f"the weights lack {min(missing)}, {len(missing)} of {len(names)} tensors asked for")
        found: dict[str, Tensor] = {}
        for path in dict.fromkeys(self.files[name] for name in names):
            try:
                with safe_open(path, framework="pt") as file:
                    found |= {name: file.get_tensor(name).clone() for name in names if self.files[name] == path}
            except (SafetensorError, OSError) as error:
                raise ValueError(f"{path} {unreadable(path, error)}") from error
        self.reads.update(names)
        return found


def tensor_names(path: Path) -> list[str]:
    """Names of the tensors in a safetensors file; ValueError for any other file."""
    try:
        with safe_open(path, framework="pt") as file:
            return list(file.keys())
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} {unreadable(path, error)}") from error


def set_parameters(network: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Replace parameters by tensors, in the parameters' precision; ValueError for another shape."""
    for name, tensor in tensors.items():
        module, _, leaf = name.rpartition(".")
        owner = network.get_submodule(module)
        old = owner.get_parameter(leaf)
        if old.shape != tensor.shape:
            raise ValueError(f"{name} has the shape {tuple(tensor.shape)} in its file, expected {tuple(old.shape)}")
        setattr(owner, leaf, nn.Parameter(tensor.to(old.dtype), requires_grad=False))


def release_parameters(network: nn.Module, names: Collection[str]) -> None:
    """Put parameters on the meta device: their memory is free once nothing else refers to them."""
    set_parameters(network, {name: network.get_parameter(name).detach().to(META) for name in names})

"""Networks on the meta device, which have shapes and no numbers."""

import copy
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from tfmq_exp.denoisers.loading.sharded_weights import META

Network = TypeVar("Network", bound=nn.Module)


@contextmanager
def parameters_on_meta() -> Iterator[None]:
    """Inside this block, modules are built with their parameters on the meta device.

    Buffers are real: a network computes tables of positions when it is built, and no file holds them.
    """
    register = nn.Module.register_parameter

    def on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        register(module, name, parameter if parameter is None else nn.Parameter(parameter.detach().to(META)))

    with patch.object(nn.Module, "register_parameter", on_meta):
        yield


def tensors_of(network: nn.Module) -> list[Tensor]:
    """All parameters and buffers."""
    return [*network.parameters(), *network.buffers()]


def skeleton(network: Network) -> Network:
    """A copy of a network on the meta device alone; it runs there, and costs neither memory nor time."""
    return copy.deepcopy(network, {id(x): like_on_meta(x) for x in tensors_of(network)})


def move_loaded(network: nn.Module, device: torch.device) -> None:
    """Move what is not on the meta device."""
    network._apply(lambda x: x if x.is_meta else x.to(device))


def like_on_meta(x: Tensor) -> Tensor:
    moved = x.detach().to(META)
    return nn.Parameter(moved, requires_grad=x.requires_grad) if isinstance(x, nn.Parameter) else moved


def on_meta(arguments: Any) -> Any:
    """A structure with its tensors on the meta device."""
    return pytree.tree_map(lambda x: x.to(META) if isinstance(x, Tensor) else x, arguments)


def loaded_part(network: Network, modules: Collection[str]) -> Network:
    """A copy of a network's outline that shares these modules with it, without what is on the meta device.

    It can be moved to a device, which a network with parameters on the meta device cannot.
    """
    shared: list[Any] = [network.get_submodule(name) for name in modules]
    memo: dict[int, Any] = {id(x): None if x.is_meta else x for x in tensors_of(network)}
    return copy.deepcopy(network, memo | {id(module): module for module in shared})

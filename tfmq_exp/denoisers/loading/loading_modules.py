"""Forward passes of a whole network with bounded memory: a module gets its weights before it runs, and loses them afterwards."""

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from tfmq_exp.denoisers.families.find import family_of
from tfmq_exp.denoisers.loading.sharded_weights import release_parameters, set_parameters

Read = Callable[[Collection[str]], Mapping[str, Tensor]]  # names of parameters -> their values


@contextmanager
def loading_modules(network: nn.Module, read: Read, device: torch.device) -> Iterator[None]:
    """Inside this block, a network can be run whose parameters are on the meta device, as can its single modules.

    A module that holds no block gets what is inside it at once, and so does a block; the others get their own
    parameters alone. What is loaded already is left alone, so that a block's layers do not load again, and a layer that
    runs outside of its block, as an embedder that others read, is loaded for itself.

    Args:
        network: of a known family; nothing of it stays loaded.
        read: gives parameters.
        device: of what is loaded.
    """
    blocks = [f"{name}." for name, _ in family_of(network).blocks(network)]
    with ExitStack() as hooks:
        for name, module in network.named_modules():
            start = f"{name}." if name else ""
            inside = not any(block != start and block.startswith(start) for block in blocks)
            names = [start + parameter for parameter, _ in module.named_parameters(recurse=inside)]
            if names:
                before, after = load_and_free(network, names, read, device)
                hooks.enter_context(module.register_forward_pre_hook(before))
                hooks.enter_context(module.register_forward_hook(after, always_call=True))
        yield


def load_and_free(
    network: nn.Module, names: Collection[str], read: Read, device: torch.device
) -> tuple[Callable[..., None], Callable[..., None]]:
    """Hooks that load those of some parameters that are on the meta device, and free these again."""
    loaded: list[str] = []

    def load(*_: Any) -> None:
        loaded[:] = [name for name in names if network.get_parameter(name).is_meta]
        if loaded:
            set_parameters(network, {name: value.to(device) for name, value in read(loaded).items()})

    def free(*_: Any) -> None:
        release_parameters(network, loaded)
        loaded.clear()

    return load, free


def called_within(call: Callable[..., Any], context: Callable[[], AbstractContextManager[Any]]) -> Callable[..., Any]:
    """A function, each call of which is inside a context of its own."""

    def inside(*args: Any, **arguments: Any) -> Any:
        with context():
            return call(*args, **arguments)

    return inside

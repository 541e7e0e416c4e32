"""The structure of a network, read from one traced forward pass."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

from tfmq_exp.denoisers.families.find import family_of
from tfmq_exp.denoisers.structure import Block, Kind, LayerInfo, NetworkStructure

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


@contextmanager
def after_each(network: nn.Module, names: Iterable[str], visit: Callable[..., None]) -> Iterator[None]:
    """In passes without gradients, call `visit(name, module, inputs, output)` after each of these modules has run."""
    with torch.no_grad(), ExitStack() as hooks:
        for name in names:
            hooks.enter_context(network.get_submodule(name).register_forward_hook(partial(visit, name)))
        yield


def read_structure(network: nn.Module, example: Mapping[str, Any]) -> NetworkStructure:
    """Layers, their cost, and blocks in execution order. A layer inside no block is a block of its own.

    The order of attributes is not the order of execution in diffusers (mid blocks are registered last, attentions before the
    resnets that feed them), hence the trace. A layer that did not run, of whose weights the network makes another use, costs
    nothing and belongs to no block.

    Args:
        network: of a known family.
        example: keyword arguments of one forward pass, with a batch of one.
    """
    family = family_of(network)
    role_of, blocks = family.roles(network), dict(family.blocks(network))
    inside = {layer: block for block in blocks for layer in role_of if f"{layer}.".startswith(f"{block}.")}
    blocks |= {layer: Kind.LAYER for layer in role_of if layer not in inside}
    sizes = {name: network.get_submodule(name).get_parameter("weight").numel() for name in role_of}
    macs, order, ran = dict.fromkeys(role_of, 0), dict[str, tuple[str, ...]](), set[str]()

    def count(name: str, layer: nn.Module, _: Any, output: Any) -> None:
        if name in role_of:
            ran.add(name)
            channels = output.shape[1] if isinstance(layer, CONVOLUTIONS) else output.shape[-1]
            macs[name] += output.numel() // channels * sizes[name]
        if name in blocks:
            order[name] = tuple(layer for layer in role_of if inside.get(layer, layer) == name and layer in ran)

    with after_each(network, {**role_of, **blocks}, count):
        network(**example)
    splits = family.splits(network)
    layers = {
        name: LayerInfo(name, role, sizes[name], macs[name], splits.get(name))
        for name, role in role_of.items()
        if name in ran
    }
    return NetworkStructure(
        layers, tuple(Block(name, blocks[name], members) for name, members in order.items() if members)
    )

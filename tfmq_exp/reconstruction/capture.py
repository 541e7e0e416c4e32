"""Inputs and outputs of units while the denoiser runs over the calibration set."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from tfmq_exp.calibration.dataset import CalibrationSet
from tfmq_exp.reconstruction.cache import Leaves, Storage
from tfmq_exp.reconstruction.partition import Unit


class StopForward(Exception):  # noqa: N818 - a signal, not an error
    """Raised by a hook once everything wanted has been seen; the rest of the network need not run."""


@contextmanager
def hooks(handles: Iterable[torch.utils.hooks.RemovableHandle]) -> Iterator[None]:
    """Remove hooks at the end of a block."""
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def run(model: nn.Module, data: CalibrationSet, batch: int) -> Iterator[int]:
    """Forward passes over the whole set, in order; yields the position of each batch when it is done."""
    device = next(model.parameters()).device
    for start in range(0, len(data), batch):
        part = data[slice(start, start + batch)]
        with suppress(StopForward):
            model(**part.inputs(device))
        yield start


def capture_inputs(model: nn.Module, unit: nn.Module, data: CalibrationSet, batch: int, storage: Storage) -> Leaves:
    """What `unit` is called with, as (args, kwargs), while `model` runs. The forward stops there."""
    seen: list[Any] = []

    def pre_hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.append((args, kwargs))
        raise StopForward

    stored: Leaves | None = None
    with hooks([unit.register_forward_pre_hook(pre_hook, with_kwargs=True)]):
        for start in run(model, data, batch):
            stored = stored or Leaves.like(seen[0], len(data), storage)
            stored.write(start, seen.pop())
    if stored is None:
        raise ValueError("there is no calibration data")
    return stored


def output_bytes(model: nn.Module, units: Mapping[str, nn.Module], data: CalibrationSet) -> dict[str, int]:
    """Bytes that each unit's output takes for one sample."""
    sizes: dict[str, int] = {}
    handles = [
        module.register_forward_hook(lambda _m, _a, out, name=name: sizes.__setitem__(name, nbytes(out)))
        for name, module in units.items()
    ]
    with hooks(handles):
        list(run(model, data[slice(0, 1)], 1))
    return sizes


def nbytes(structure: Any) -> int:
    """Bytes of all tensors in a nested structure."""
    leaves = pytree.tree_leaves(structure)
    return sum(leaf.nbytes for leaf in leaves if isinstance(leaf, Tensor))


def capture_outputs(
    unet: nn.Module, units: Sequence[Unit], data: CalibrationSet, batch: int, storage: Storage
) -> dict[str, Leaves]:
    """What several units return while the float model runs once; the forward stops after the last of them."""
    modules = {unit.name: unit.module(unet) for unit in units}
    seen: dict[str, Any] = {}

    def hook(name: str, output: Any) -> None:
        seen[name] = output
        if len(seen) == len(modules):
            raise StopForward

    stored: dict[str, Leaves] = {}
    handles = [m.register_forward_hook(lambda _m, _a, out, name=n: hook(name, out)) for n, m in modules.items()]
    with hooks(handles):
        for start in run(unet, data, batch):
            for name, output in seen.items():
                if name not in stored:
                    stored[name] = Leaves.like(output, len(data), storage)
                stored[name].write(start, output)
            seen.clear()
    return stored


def groups_within(sizes: Mapping[str, int], budget: int) -> list[list[str]]:
    """Consecutive names whose sizes together stay within the budget; at least one name in a group."""
    groups: list[list[str]] = []
    used = 0
    for name, size in sizes.items():
        if not groups or used + size > budget:
            groups.append([])
            used = 0
        groups[-1].append(name)
        used += size
    return groups

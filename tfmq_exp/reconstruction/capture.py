"""Capture of units' inputs and outputs while the denoiser runs over the calibration set.

Inputs are stored as (timesteps, args, kwargs): per-step scales need the timestep of each row.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from tfmq_exp.calibration.dataset import CalibrationSet
from tfmq_exp.core.batches import batches
from tfmq_exp.denoisers.denoiser import noise_of
from tfmq_exp.finite import within
from tfmq_exp.reconstruction.activation_cache import SpillAllocator, TensorTree
from tfmq_exp.reconstruction.units import Unit

Call = tuple[tuple[Any, ...], dict[str, Any], Any]  # args, kwargs, output of a module


class StopForward(Exception):  # noqa: N818 - a signal, not an error
    """Raised by a hook once everything is captured: the rest of the network need not run."""


@contextmanager
def hooks(handles: Iterable[torch.utils.hooks.RemovableHandle]) -> Iterator[None]:
    """Remove hooks at the end of a block."""
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def forward_batches(model: nn.Module, data: CalibrationSet, batch: int) -> Iterator[tuple[int, Tensor]]:
    """Run the network over the set in order; yield the first index and the timesteps of each batch after its pass."""
    device = next(model.parameters()).device
    for rows in batches(len(data), batch):
        part = data[slice(rows.start, rows.stop)]
        with suppress(StopForward):
            model(**part.inputs(device))
        yield rows.start, part.t


def capture_inputs(
    model: nn.Module, module: nn.Module, data: CalibrationSet, batch: int, storage: SpillAllocator
) -> TensorTree:
    """Inputs of `module` while `model` runs over the set; each forward pass stops there."""
    seen: list[Any] = []

    def pre_hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.append((args, kwargs))
        raise StopForward

    stored: TensorTree | None = None
    with hooks([module.register_forward_pre_hook(pre_hook, with_kwargs=True)]):
        for start, t in forward_batches(model, data, batch):
            inputs = (t, *seen.pop())
            stored = stored or TensorTree.like(inputs, len(data), storage)
            stored.write(start, inputs)
    if stored is None:
        raise ValueError("there is no calibration data")
    return stored


@contextmanager
def recorded_calls(modules: Mapping[str, nn.Module]) -> Iterator[dict[str, Call]]:
    """Record the latest call of every module by name; a forward pass stops once all are there. Clear it between passes."""
    calls: dict[str, Call] = {}

    def record(name: str, *call: Any) -> None:
        calls[name] = call
        if len(calls) == len(modules):
            raise StopForward

    def hook(name: str) -> Any:
        return lambda _, args, kwargs, output: record(name, args, kwargs, output)

    with hooks([m.register_forward_hook(hook(name), with_kwargs=True) for name, m in modules.items()]):
        yield calls


@dataclass(frozen=True)
class UnitActivations:
    """Outputs of a unit in the float network over the calibration set, and its inputs where they are used."""

    inputs: TensorTree | None
    outputs: TensorTree


def capture_float(
    unet: nn.Module,
    units: Sequence[Unit],
    data: CalibrationSet,
    batch: int,
    storage: SpillAllocator,
    *,
    with_inputs: bool,
) -> dict[str, UnitActivations]:
    """Capture several units in one pass of the float network over the set.

    Args:
        unet: the float network.
        units: units of it that the denoiser drives.
        data: calibration samples.
        batch: samples of a forward pass.
        storage: allocator of what is captured.
        with_inputs: whether inputs are captured, too.
    """
    inputs: dict[str, TensorTree] = {}
    outputs: dict[str, TensorTree] = {}

    def write(stored: dict[str, TensorTree], kind: str, name: str, start: int, value: Any) -> None:
        if name not in stored:
            stored[name] = TensorTree.like(value, len(data), storage)
        with within(f"the {kind} of {name} in the float network"):
            stored[name].write(start, value)

    with recorded_calls({unit.name: unit.module(unet) for unit in units}) as calls:
        for start, t in forward_batches(unet, data, batch):
            for name, (args, kwargs, _) in calls.items() if with_inputs else ():
                write(inputs, "inputs", name, start, (t, args, kwargs))
            for name, (_, _, output) in calls.items():
                write(outputs, "outputs", name, start, output)
            calls.clear()
    return {unit.name: UnitActivations(inputs.get(unit.name), outputs[unit.name]) for unit in units}


def sample_bytes(unet: nn.Module, units: Sequence[Unit], data: CalibrationSet, *, with_inputs: bool) -> dict[str, int]:
    """Bytes of each unit's outputs for one sample, with those of its inputs where asked for."""
    with recorded_calls({unit.name: unit.module(unet) for unit in units}) as calls:
        list(forward_batches(unet, data[slice(0, 1)], 1))
    leaves = {name: pytree.tree_leaves(call if with_inputs else call[-1]) for name, call in calls.items()}
    return {name: sum(x.nbytes for x in tensors if isinstance(x, Tensor)) for name, tensors in leaves.items()}


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


def capture_squared_gradients(
    unet: nn.Module,
    units: Sequence[Unit],
    data: CalibrationSet,
    batch: int,
    storage: SpillAllocator,
    generator: torch.Generator,
) -> dict[str, TensorTree]:
    """(J^T v)^2 at the units' outputs, J from there to the predicted noise, v standard normal; mean 1 for every unit.

    Args:
        unet: the float network.
        units: only those that the denoiser drives have gradients.
        data: calibration samples.
        batch: samples of a forward pass.
        storage: allocator of the result.
        generator: of v.
    """
    modules = {unit.name: unit.module(unet) for unit in units if unit.driver == "denoiser"}
    device = next(unet.parameters()).device
    outputs: dict[str, list[Tensor]] = {}
    stored: dict[str, TensorTree] = {}

    def hook(name: str, output: Any) -> None:
        outputs[name] = pytree.tree_leaves(output)
        for leaf in outputs[name]:
            if not leaf.requires_grad:  # it depends on the timestep alone
                leaf.requires_grad_()

    handles = [m.register_forward_hook(lambda _m, _a, out, name=n: hook(name, out)) for n, m in modules.items()]
    with hooks(handles), torch.enable_grad():
        for rows in batches(len(data), batch) if modules else ():
            inputs = data[slice(rows.start, rows.stop)].inputs(device)
            inputs[
                "sample"
            ].requires_grad_()  # weights are frozen, and autograd needs one leaf that requires a gradient
            predicted = noise_of(unet(**inputs).sample, inputs["sample"])
            v = torch.randn(predicted.shape, generator=generator).to(predicted)
            gradients = iter(torch.autograd.grad(predicted, [x for name in modules for x in outputs[name]], v))
            for name in modules:
                squared = [next(gradients).square() for _ in outputs[name]]
                if name not in stored:
                    stored[name] = TensorTree.like(squared, len(data), storage)
                with within(f"the gradients at the outputs of {name}"):
                    stored[name].write(rows.start, squared)
            outputs.clear()
    for tree in stored.values():
        for squared in tree.tensors:
            squared.div_(squared.mean().clamp(min=torch.finfo(squared.dtype).tiny))
    return stored

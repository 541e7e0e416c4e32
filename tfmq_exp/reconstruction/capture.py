"""Inputs and outputs of units while the denoiser runs over the calibration set.

What a unit is fed is stored as (timesteps, args, kwargs): per-step scales need to know where each row stands.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from tfmq_exp.calibration.dataset import CalibrationSet
from tfmq_exp.core.finite import within
from tfmq_exp.denoisers.denoiser import noise_of
from tfmq_exp.quant.timestep_context import TimestepContext
from tfmq_exp.reconstruction.activation_cache import SpillAllocator, TensorTree
from tfmq_exp.reconstruction.units import Unit


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
def run(model: nn.Module, data: CalibrationSet, batch: int) -> Iterator[tuple[int, Tensor]]:
    """Forward passes over the whole set, in order; yields the position and the timesteps of each batch when it is done."""
    device = next(model.parameters()).device
    for start in range(0, len(data), batch):
        part = data[slice(start, start + batch)]
        with suppress(StopForward):
            model(**part.inputs(device))
        yield start, part.t


def capture_inputs(
    model: nn.Module, unit: nn.Module, data: CalibrationSet, batch: int, storage: SpillAllocator
) -> TensorTree:
    """What `unit` is fed while `model` runs. The forward stops there."""
    seen: list[Any] = []

    def pre_hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.append((args, kwargs))
        raise StopForward

    stored: TensorTree | None = None
    with hooks([unit.register_forward_pre_hook(pre_hook, with_kwargs=True)]):
        for start, t in run(model, data, batch):
            fed = (t, *seen.pop())
            stored = stored or TensorTree.like(fed, len(data), storage)
            stored.write(start, fed)
    if stored is None:
        raise ValueError("there is no calibration data")
    return stored


@dataclass(frozen=True)
class UnitActivations:
    """What the float network does at one unit: what it is fed (if that was wanted) and what it returns."""

    fed: TensorTree | None
    returned: TensorTree


def capture_float(
    unet: nn.Module, units: Sequence[Unit], data: CalibrationSet, batch: int, storage: SpillAllocator, *, fed: bool
) -> dict[str, UnitActivations]:
    """Several units at once, in one pass of the float network that stops after the last of them."""
    modules = {unit.name: unit.module(unet) for unit in units}
    inputs: dict[str, Any] = {}
    outputs: dict[str, Any] = {}

    def before(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        inputs[name] = (args, kwargs)

    def after(name: str, output: Any) -> None:
        outputs[name] = output
        if len(outputs) == len(modules):
            raise StopForward

    handles = [m.register_forward_hook(lambda _m, _a, out, name=n: after(name, out)) for n, m in modules.items()]
    if fed:
        handles += [
            m.register_forward_pre_hook(lambda _m, args, kwargs, name=n: before(name, args, kwargs), with_kwargs=True)
            for n, m in modules.items()
        ]
    stored: dict[str, dict[str, TensorTree]] = {"fed": {}, "returned": {}}

    def keep(kind: str, name: str, start: int, value: Any) -> None:
        if name not in stored[kind]:
            stored[kind][name] = TensorTree.like(value, len(data), storage)
        with within(f"what {name} {'is fed' if kind == 'fed' else 'returns'} in the float network"):
            stored[kind][name].write(start, value)

    with hooks(handles):
        for start, t in run(unet, data, batch):
            for name, (args, kwargs) in inputs.items():
                keep("fed", name, start, (t, args, kwargs))
            for name, output in outputs.items():
                keep("returned", name, start, output)
            inputs.clear()
            outputs.clear()
    return {name: UnitActivations(stored["fed"].get(name), stored["returned"][name]) for name in modules}


def capture_squared_gradients(
    unet: nn.Module,
    units: Sequence[Unit],
    data: CalibrationSet,
    batch: int,
    storage: SpillAllocator,
    generator: torch.Generator,
) -> dict[str, TensorTree]:
    """(J^T v)^2 at the units' outputs, J from there to the predicted noise, v standard normal; mean 1 for every unit."""
    modules = {unit.name: unit.module(unet) for unit in units if unit.driver == "denoiser"}
    if not modules:
        return {}
    device = next(unet.parameters()).device
    outputs: dict[str, Any] = {}
    stored: dict[str, TensorTree] = {}

    def hook(name: str, output: Any) -> None:
        for leaf in pytree.tree_leaves(output):
            if not leaf.requires_grad:  # it depends on the timestep alone
                leaf.requires_grad_()
        outputs[name] = output

    handles = [m.register_forward_hook(lambda _m, _a, out, name=n: hook(name, out)) for n, m in modules.items()]
    with hooks(handles), torch.enable_grad():
        for start in range(0, len(data), batch):
            inputs = data[slice(start, start + batch)].inputs(device)
            inputs["sample"].requires_grad_()  # the weights do not, and something must
            predicted = noise_of(unet(**inputs).sample, inputs["sample"])
            v = torch.randn(predicted.shape, generator=generator).to(predicted)
            leaves = {name: pytree.tree_leaves(outputs[name]) for name in modules}
            gradients = iter(torch.autograd.grad(predicted, [x for xs in leaves.values() for x in xs], v))
            for name, xs in leaves.items():
                squared = [next(gradients).square() for _ in xs]
                if name not in stored:
                    stored[name] = TensorTree.like(squared, len(data), storage)
                with within(f"the gradients at the outputs of {name}"):
                    stored[name].write(start, squared)
            outputs.clear()
    for leaves in stored.values():
        for squared in leaves.tensors:
            squared.div_(squared.mean().clamp(min=torch.finfo(squared.dtype).tiny))
    return stored


def call(unit: nn.Module, context: TimestepContext, fed: Any) -> Any:
    """Run a unit on (timesteps of the rows, args, kwargs)."""
    t, args, kwargs = fed
    with context.at(t):
        return unit(*args, **kwargs)


@torch.no_grad()
def run_unit(
    unit: nn.Module, context: TimestepContext, fed: TensorTree, batch: int, storage: SpillAllocator
) -> TensorTree:
    """What a unit returns for all that it is fed."""
    device, samples = next(unit.parameters()).device, len(fed)
    stored: TensorTree | None = None
    for start, part in zip(range(0, samples, batch), fed.batches(batch, device), strict=True):
        outputs = call(unit, context, part)
        stored = stored or TensorTree.like(outputs, samples, storage)
        stored.write(start, outputs)
    assert stored is not None
    return stored


class OutputReplay:
    """What finished units return over the calibration set, so that later passes need not run them again.

    Without it, capturing the inputs of every unit would run the network's beginning once per unit. Outputs are kept in
    memory up to a budget; the oldest go first, and their units are then run as usual.
    """

    def __init__(self, budget: int) -> None:
        self.budget = budget
        self.outputs: dict[nn.Module, TensorTree] = {}

    def add(self, unit: nn.Module, outputs: TensorTree) -> None:
        """Keep what a finished unit returned, for all samples in order."""
        self.outputs[unit] = outputs
        while self.outputs and sum(leaves.nbytes for leaves in self.outputs.values()) > self.budget:
            del self.outputs[next(iter(self.outputs))]

    @contextmanager
    def instead(self, batch: int) -> Iterator[None]:
        """Have the units return what is kept, batch by batch, during one pass over the set."""
        for unit, leaves in self.outputs.items():
            batches = leaves.batches(batch, next(unit.parameters()).device)
            unit.forward = lambda *_args, _batches=batches, **_kwargs: next(_batches)
        try:
            yield
        finally:
            for unit in self.outputs:
                del unit.forward


def bytes_at(model: nn.Module, units: Mapping[str, nn.Module], data: CalibrationSet, *, fed: bool) -> dict[str, int]:
    """Bytes of what each unit returns for one sample, and of what it is fed if that is wanted."""
    sizes: dict[str, int] = {}

    def hook(name: str, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        sizes[name] = nbytes((args, kwargs, output) if fed else output)

    handles = [
        module.register_forward_hook(lambda _m, a, k, out, name=name: hook(name, a, k, out), with_kwargs=True)
        for name, module in units.items()
    ]
    with hooks(handles):
        list(run(model, data[slice(0, 1)], 1))
    return sizes


def nbytes(structure: Any) -> int:
    """Bytes of all tensors in a nested structure."""
    leaves = pytree.tree_leaves(structure)
    return sum(leaf.nbytes for leaf in leaves if isinstance(leaf, Tensor))


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

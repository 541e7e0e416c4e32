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
from tfmq_exp.core.finite import within
from tfmq_exp.denoisers.denoiser import noise_of
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


@dataclass(frozen=True)
class Capture:
    """Capture over a calibration set, `batch` samples at a time, into tensors of `storage`."""

    data: CalibrationSet
    batch: int
    storage: SpillAllocator

    def parts(self, network: nn.Module) -> Iterator[tuple[int, CalibrationSet, dict[str, Any]]]:
        """First index, samples and network inputs of each batch."""
        device = next(network.parameters()).device
        for rows in batches(len(self.data), self.batch):
            part = self.data[slice(rows.start, rows.stop)]
            yield rows.start, part, part.inputs(device)

    @torch.no_grad()
    def forward(self, network: nn.Module) -> Iterator[tuple[int, Tensor]]:
        """Run the network batch by batch; yield the first index and the timesteps of each after its pass."""
        for start, part, inputs in self.parts(network):
            with suppress(StopForward):
                network(**inputs)
            yield start, part.t

    def write(self, stored: dict[str, TensorTree], name: str, start: int, value: Any) -> None:
        """Store a batch under a name, with room for all samples."""
        if name not in stored:
            stored[name] = TensorTree.like(value, len(self.data), self.storage)
        stored[name].write(start, value)

    def inputs(self, network: nn.Module, module: nn.Module) -> TensorTree:
        """Inputs of a module while the network runs over the set; each forward pass stops there."""
        seen: list[Any] = []
        stored: dict[str, TensorTree] = {}

        def pre_hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            seen.append((args, kwargs))
            raise StopForward

        with hooks([module.register_forward_pre_hook(pre_hook, with_kwargs=True)]):
            for start, t in self.forward(network):
                self.write(stored, "inputs", start, (t, *seen.pop()))
        if not stored:
            raise ValueError("there is no calibration data")
        return stored["inputs"]

    def activations(self, unet: nn.Module, units: Sequence[Unit], *, with_inputs: bool) -> dict[str, UnitActivations]:
        """Outputs, and inputs where asked for, of several units in one pass over the set."""
        inputs: dict[str, TensorTree] = {}
        outputs: dict[str, TensorTree] = {}
        with recorded_calls({unit.name: unit.module(unet) for unit in units}) as calls:
            for start, t in self.forward(unet):
                for name, (args, kwargs, output) in calls.items():
                    with within(f"the inputs of {name} in the float network"):
                        if with_inputs:
                            self.write(inputs, name, start, (t, args, kwargs))
                    with within(f"the outputs of {name} in the float network"):
                        self.write(outputs, name, start, output)
                calls.clear()
        return {unit.name: UnitActivations(inputs.get(unit.name), outputs[unit.name]) for unit in units}

    def squared_gradients(
        self, unet: nn.Module, units: Sequence[Unit], generator: torch.Generator
    ) -> dict[str, TensorTree]:
        """(J^T v)^2 at the outputs of units that the denoiser drives, scaled to a mean of 1 for every unit.

        J is the Jacobian from there to the predicted noise, v standard normal from the generator.
        """
        modules = {unit.name: unit.module(unet) for unit in units if unit.driver == "denoiser"}
        outputs: dict[str, list[Tensor]] = {}
        stored: dict[str, TensorTree] = {}

        def hook(name: str, output: Any) -> None:
            outputs[name] = pytree.tree_leaves(output)
            for leaf in outputs[name]:
                if not leaf.requires_grad:  # it depends on the timestep alone
                    leaf.requires_grad_()

        handles = [m.register_forward_hook(lambda _m, _a, out, name=n: hook(name, out)) for n, m in modules.items()]
        with hooks(handles), torch.enable_grad():
            for start, _, inputs in self.parts(unet) if modules else ():
                inputs[
                    "sample"
                ].requires_grad_()  # weights are frozen; autograd needs one leaf that requires a gradient
                predicted = noise_of(unet(**inputs).sample, inputs["sample"])
                v = torch.randn(predicted.shape, generator=generator).to(predicted)
                gradients = iter(torch.autograd.grad(predicted, [x for name in modules for x in outputs[name]], v))
                for name in modules:
                    with within(f"the gradients at the outputs of {name}"):
                        self.write(stored, name, start, [next(gradients).square() for _ in outputs[name]])
                outputs.clear()
        for squared in (x for tree in stored.values() for x in tree.tensors):
            squared.div_(squared.mean().clamp(min=torch.finfo(squared.dtype).tiny))
        return stored


def sample_bytes(unet: nn.Module, units: Sequence[Unit], data: CalibrationSet, *, with_inputs: bool) -> dict[str, int]:
    """Bytes of each unit's outputs for one sample, by the unit's name.

    Args:
        unet: the float network.
        units: of it.
        data: one sample of it is run.
        with_inputs: add the bytes of the unit's inputs.
    """
    with recorded_calls({unit.name: unit.module(unet) for unit in units}) as calls:
        list(Capture(data[slice(0, 1)], 1, SpillAllocator(0)).forward(unet))
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

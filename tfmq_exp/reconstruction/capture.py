"""Inputs and outputs of units: captured while the denoiser runs over the calibration set, and run again.

Inputs are stored as (timesteps, args, kwargs): per-step scales need the timestep of each row.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from tfmq_exp.calibration.dataset import CalibrationSet
from tfmq_exp.core.batches import batches
from tfmq_exp.core.devices import device_of
from tfmq_exp.core.finite import within
from tfmq_exp.denoisers.denoiser import noise_of
from tfmq_exp.quant.timestep_context import TimestepContext
from tfmq_exp.reconstruction.activation_cache import (
    SpillAllocator,
    TensorTree,
    fold,
    mark_shared,
    shared_leaves,
    without_last,
)
from tfmq_exp.reconstruction.cache_format import CacheFormat, encode
from tfmq_exp.reconstruction.recorded_calls import StopForward, recorded_calls
from tfmq_exp.reconstruction.units import Origin, Unit


class UnitActivations(NamedTuple):
    """A unit over the calibration set: inputs by network, as far as captured, and outputs in the float one with their importance."""

    inputs: Mapping[Origin, TensorTree]
    outputs: TensorTree
    importance: TensorTree | None = None


@dataclass(frozen=True)
class Capture:
    """Capture over a calibration set, `batch` samples at a time, into tensors of `storage`."""

    data: CalibrationSet
    batch: int
    storage: SpillAllocator
    device: torch.device | None = None  # of the network's inputs, where it may have no parameters in memory

    def parts(self, network: nn.Module) -> Iterator[tuple[int, Tensor, dict[str, Any]]]:
        """First index, timesteps and network inputs of each batch, after whose rows those of `extremes` follow."""
        device, extremes = self.device or device_of(network), self.data.extremes()
        for rows in batches(len(self.data), self.batch):
            part = self.data[torch.cat([torch.tensor(rows), extremes])]
            yield rows.start, part.t[: len(rows)], part.inputs(device)

    @torch.no_grad()
    def forward(self, network: nn.Module) -> Iterator[tuple[int, Tensor]]:
        """Run the network batch by batch; yield the first index and the timesteps of each after its pass."""
        for start, t, inputs in self.parts(network):
            with suppress(StopForward):
                network(**inputs)
            yield start, t

    def write(self, stored: dict[str, TensorTree], name: str, start: int, value: Any) -> None:
        """Store a batch under a name, with room for all samples."""
        count = min(self.batch, len(self.data) - start)
        rows = fold(without_last(value, count, len(self.data.extremes())), count)
        if name not in stored:
            stored[name] = TensorTree.like(rows, len(self.data), self.storage)
        stored[name].write(start, rows)

    def inputs(self, network: nn.Module, module: nn.Module, shared: Sequence[bool] = ()) -> TensorTree:
        """Inputs of a module while the network runs over the set; each forward pass stops there.

        `shared` are those of its unit in `shared_inputs`.
        """
        if not len(self.data):
            raise ValueError("there is no calibration data")
        stored: dict[str, TensorTree] = {}
        with recorded_calls({"inputs": module}, before=True) as calls:
            for start, t in self.forward(network):
                self.write(stored, "inputs", start, (t, *mark_shared(calls.pop("inputs"), shared)))
        return stored["inputs"]

    def activations(
        self,
        network: nn.Module,
        units: Sequence[Unit],
        shared: Mapping[str, Sequence[bool]] | None = None,
        *,
        with_inputs: bool,
    ) -> dict[str, UnitActivations]:
        """Outputs, and inputs where asked for, of several units in one pass over the set; `shared` by unit, see `shared_inputs`."""
        inputs: dict[str, TensorTree] = {}
        outputs: dict[str, TensorTree] = {}
        with recorded_calls({unit.name: unit.module(network) for unit in units}) as calls:
            for start, t in self.forward(network):
                for name, (*call, output) in calls.items():
                    with within(f"the inputs of {name} in the float network"):
                        if with_inputs:
                            self.write(
                                inputs, name, start, (t, *mark_shared(tuple(call), (shared or {}).get(name, ())))
                            )
                    with within(f"the outputs of {name} in the float network"):
                        self.write(outputs, name, start, output)
                calls.clear()
        return {
            name: UnitActivations({"float": inputs[name]} if with_inputs else {}, tree)
            for name, tree in outputs.items()
        }

    def squared_gradients(
        self, network: nn.Module, units: Sequence[Unit], generator: torch.Generator
    ) -> dict[str, TensorTree]:
        """(J^T v)^2 at the outputs of units that the denoiser drives, scaled to a mean of 1 for every unit.

        J is the Jacobian from there to the predicted noise, v standard normal from the generator.
        """
        modules = {unit.name: unit.module(network) for unit in units if unit.driver == "denoiser"}
        outputs: dict[str, list[Tensor]] = {}
        stored: dict[str, TensorTree] = {}
        storage = SpillAllocator(self.storage.budget, self.storage.folder)
        exact = replace(self, storage=storage)  # squares span too wide a range

        def hook(name: str, output: Any) -> None:
            outputs[name] = [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor)]
            for leaf in outputs[name]:
                if not leaf.requires_grad:  # it depends on the timestep alone
                    leaf.requires_grad_()

        with ExitStack() as hooks, torch.enable_grad():
            for name, module in modules.items():
                hooks.enter_context(module.register_forward_hook(lambda _m, _a, out, _name=name: hook(_name, out)))
            for start, _, inputs in self.parts(network) if modules else ():
                sample = inputs[self.data.first_argument]
                sample.requires_grad_()  # weights are frozen; autograd needs a leaf that requires a gradient
                predicted = noise_of(network(**inputs).sample, sample)
                v = torch.randn(predicted.shape, generator=generator).to(predicted)
                every = [x for name in modules for x in outputs[name]]
                # zeros for an output that nothing reads: of the last block, the words of the text
                gradients = iter(torch.autograd.grad(predicted, every, v, materialize_grads=True))
                for name in modules:
                    with within(f"the gradients at the outputs of {name}"):
                        exact.write(stored, name, start, [next(gradients).square() for _ in outputs[name]])
                outputs.clear()
        for squared in (x for tree in stored.values() for x in tree.tensors):
            squared.div_(squared.mean().clamp(min=torch.finfo(squared.dtype).tiny))
        return stored


@torch.no_grad()
def shared_inputs(network: nn.Module, units: Sequence[Unit], data: CalibrationSet) -> dict[str, list[bool]]:
    """Of every unit's (args, kwargs), which leaves are tensors that all samples share, such as rotary tables.

    Passes of one sample and of two tell: the size of a batch alone may be that of a table.

    Args:
        network: the float network.
        units: that it runs.
        data: of which the first samples are taken.
    """
    calls: list[dict[str, Any]] = []
    with recorded_calls({unit.name: unit.module(network) for unit in units}) as recorded:
        for count in (1, 2):
            rows = torch.arange(count) % max(1, len(data))
            list(Capture(data[rows], count, SpillAllocator(0)).forward(network))
            calls.append({name: call[:2] for name, call in recorded.items()})
            recorded.clear()
    return {name: shared_leaves(one, calls[1][name]) for name, one in calls[0].items()}


def sample_bytes(
    network: nn.Module, units: Sequence[Unit], data: CalibrationSet, *, with_inputs: bool, form: CacheFormat
) -> dict[str, int]:
    """Cached bytes of each unit's outputs in the float network for the first sample, with those of its inputs if asked for.

    Args:
        network: the float network.
        units: that it runs.
        data: of which the first sample is taken.
        with_inputs: count them, too.
        form: in which activations are cached.
    """
    with recorded_calls({unit.name: unit.module(network) for unit in units}) as calls:
        list(Capture(data[slice(0, 1)], 1, SpillAllocator(0)).forward(network))
    found = {name: encode(call if with_inputs else call[-1], form) for name, call in calls.items()}
    return {name: TensorTree(tree).nbytes for name, tree in found.items()}


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


def call_unit(unit: nn.Module, context: TimestepContext, inputs: Any) -> Any:
    """Outputs of a unit for inputs (timesteps of the rows, args, kwargs).

    The timesteps must be those of the finite set: `reconstruct` has checked them, and no iteration waits for a device to look.
    """
    t, args, kwargs = inputs
    with context.at(t, outside="unchecked"):
        return unit(*args, **kwargs)


@torch.no_grad()
def run_unit(
    unit: nn.Module, context: TimestepContext, inputs: TensorTree, batch: int, storage: SpillAllocator
) -> TensorTree:
    """Outputs of a unit for all stored inputs, of which there are some.

    Args:
        unit: module of the network.
        context: set to the timesteps of each batch.
        inputs: see `call_unit`.
        batch: samples of a forward pass.
        storage: of the outputs.
    """
    stored: TensorTree | None = None
    parts = inputs.batches(batch, device_of(unit))
    for rows, part in zip(batches(len(inputs), batch), parts, strict=True):
        outputs = fold(call_unit(unit, context, part), len(rows))
        stored = stored or TensorTree.like(outputs, len(inputs), storage)
        stored.write(rows.start, outputs)
    assert stored is not None
    return stored

"""Calls of single units: on stored inputs, and their replay in passes of the whole network."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from tfmq_exp.core.batches import batches
from tfmq_exp.quant.timestep_context import TimestepContext
from tfmq_exp.reconstruction.activation_cache import SpillAllocator, TensorTree


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
    """Outputs of a unit for all stored inputs.

    Args:
        unit: module of the network.
        context: set to the timesteps of each batch.
        inputs: (timesteps, args, kwargs) of all samples.
        batch: samples of a forward pass.
        storage: of the outputs.
    """
    stored: TensorTree | None = None
    device = next(unit.parameters()).device
    for rows, part in zip(batches(len(inputs), batch), inputs.batches(batch, device), strict=True):
        outputs = call_unit(unit, context, part)
        stored = stored or TensorTree.like(outputs, len(inputs), storage)
        stored.write(rows.start, outputs)
    assert stored is not None
    return stored


class OutputReplay:
    """Outputs of finished units over the calibration set, which later passes return in place of running them again.

    Without it, capturing the inputs of every unit would run the network's beginning once per unit. Outputs are kept in memory
    up to a budget in bytes; the oldest go first, and their units then run as usual.
    """

    def __init__(self, budget: int) -> None:
        self.budget = budget
        self.outputs: dict[nn.Module, TensorTree] = {}

    def add(self, unit: nn.Module, outputs: TensorTree) -> None:
        """Keep the outputs of a finished unit, for all samples in order."""
        self.outputs[unit] = outputs
        while self.outputs and sum(tree.nbytes for tree in self.outputs.values()) > self.budget:
            del self.outputs[next(iter(self.outputs))]

    @contextmanager
    def active(self, batch: int) -> Iterator[None]:
        """Replay the outputs, batch by batch, during one pass over the set."""
        for unit, tree in self.outputs.items():
            stored = tree.batches(batch, next(unit.parameters()).device)
            unit.forward = lambda *_args, _stored=stored, **_kwargs: next(_stored)
        try:
            yield
        finally:
            for unit in self.outputs:
                del unit.forward

"""Outputs of finished units, replayed in later passes over the calibration set."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from tfmq_exp.reconstruction.activation_cache import TensorTree


class OutputReplay:
    """Outputs of finished units over the calibration set, which later passes return in place of running them again.

    Without it, capturing the inputs of every unit would run the network's beginning once per unit. Outputs are kept in memory
    up to a budget in bytes; the oldest go first, and their units then run as usual.
    """

    def __init__(self, budget: int) -> None:
        self.budget = budget
        self.outputs: dict[nn.Module, TensorTree] = {}

    def holds(self, outputs: TensorTree) -> bool:
        """Whether outputs of this size can be kept at all."""
        return outputs.nbytes <= self.budget

    def add(self, unit: nn.Module, outputs: TensorTree) -> None:
        """Keep the outputs of a finished unit, for all samples in order."""
        self.outputs[unit] = outputs
        while sum(tree.nbytes for tree in self.outputs.values()) > self.budget:
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

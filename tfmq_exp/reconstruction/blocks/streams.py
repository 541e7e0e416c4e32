"""Streams of activations through a segment: the inputs of its present unit, over which the outputs are written."""

from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from tfmq_exp.core.batches import batches
from tfmq_exp.core.devices import device_of
from tfmq_exp.quant.timestep_context import TimestepContext
from tfmq_exp.reconstruction.activation_cache import Folded, SpillAllocator, TensorTree, fold, has_samples
from tfmq_exp.reconstruction.blocks.chain import FromFirst, FromOutput, Link
from tfmq_exp.reconstruction.cache_format import Bytes, CacheFormat
from tfmq_exp.reconstruction.capture import call_unit


class ReusedTensors:
    """Allocates from tensors that are not read any more, where one fits, and else from an allocator."""

    def __init__(self, storage: SpillAllocator, free: list[Tensor]) -> None:
        self.storage, self.free = storage, free
        self.form: CacheFormat = storage.form

    def allocate(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """An uninitialised tensor."""
        for i, x in enumerate(self.free):
            if x.shape == shape and x.dtype == dtype and x.is_contiguous():
                return self.free.pop(i)
        return self.storage.allocate(shape, dtype)


class Stream:
    """Activations of one network between the units of a segment, over all samples.

    Args:
        first: inputs of the segment's first unit, in tensors of `storage`.
        constants: leaves of their (args, kwargs) that later units read, too.
        storage: of all that follows.
    """

    def __init__(self, first: TensorTree, constants: Collection[int], storage: SpillAllocator) -> None:
        self.t, *call = first.whole
        self.first = leaves_of(tuple(call))
        self.whole, self.constants, self.storage = first, constants, storage
        self.outputs: list[Any] | None = None  # leaves of what the last unit returned
        self.returned = TensorTree(())  # the same as a structure
        self.free: list[Tensor] = []

    def inputs(self, link: Link) -> TensorTree:
        """Inputs of the next unit."""
        if self.outputs is None:
            return self.whole

        def leaf(source: Any) -> Any:
            if isinstance(source, FromOutput):
                return (self.outputs or ())[source.index]
            return self.first[source.index] if isinstance(source, FromFirst) else source

        call = pytree.tree_unflatten([leaf(source) for source in link.sources], link.spec)
        return TensorTree((self.t, *call), self.storage.form)

    def advance(
        self, link: Link, unit: nn.Module, context: TimestepContext, batch: int, *, keep: bool = False
    ) -> TensorTree:
        """Run the next unit over all samples, and return its outputs.

        They are written over its inputs where shapes agree. The others' room is given back.

        Args:
            link: the unit in its segment.
            unit: its module.
            context: of timesteps.
            batch: samples of a forward pass.
            keep: leave its inputs in place until the unit after it has run.
        """
        inputs, read = self.inputs(link), self.outputs
        if read is None:
            read = [None if i in self.constants else leaf for i, leaf in enumerate(self.first)]
            self.first = [leaf if i in self.constants else None for i, leaf in enumerate(self.first)]
            self.whole = TensorTree(())
        used = tensors_in(read)
        self.free += () if keep else used
        outputs = run_over(unit, context, inputs, batch, ReusedTensors(self.storage, self.free))
        for x in self.free:
            self.storage.release(x)
        self.free = used if keep else []
        self.outputs, self.returned = leaves_of(outputs.whole), outputs
        return outputs

    def close(self, *, keep_outputs: bool) -> None:
        """Give back the room of everything, but for the last outputs where they are kept."""
        for x in [*self.free, *tensors_in([self.t, *self.first, *(() if keep_outputs else self.outputs or ())])]:
            self.storage.release(x)
        self.free, self.first = [], []


def leaves_of(stored: Any) -> list[Any]:
    """Leaves of a stored structure as the network has them: a tensor in a format is one."""
    return pytree.tree_leaves(stored, is_leaf=lambda x: isinstance(x, Folded | Bytes))


def tensors_in(stored: Any) -> list[Tensor]:
    """The tensors with samples in a stored structure."""
    return [x for x in pytree.tree_leaves(stored) if has_samples(x)]


def run_over(
    unit: nn.Module,
    context: TimestepContext,
    inputs: TensorTree,
    batch: int,
    storage: ReusedTensors,
) -> TensorTree:
    """Outputs of a unit for all stored inputs, in tensors that may be those of the inputs.

    Args:
        unit: module of the network.
        context: set to the timesteps of each batch.
        inputs: see `call_unit`.
        batch: samples of a forward pass.
        storage: of the outputs.
    """
    stored: TensorTree | None = None
    addresses = {x.untyped_storage().data_ptr() for x in inputs.tensors}
    parts = inputs.batches(batch, device_of(unit))
    with torch.no_grad():
        for rows, part in zip(batches(len(inputs), batch), parts, strict=True):
            returned = pytree.tree_map(unshared(addresses), call_unit(unit, context, part))
            outputs = fold(returned, len(rows))
            if stored is None:
                stored = TensorTree.like(outputs, len(inputs), storage)  # type: ignore[arg-type]
            stored.write(rows.start, outputs)
    assert stored is not None
    return stored


def unshared(addresses: set[int]) -> Callable[[Any], Any]:
    """A function that copies tensors in some memory: a unit may return an input as it is, and its place is another's."""
    return lambda x: x.clone() if isinstance(x, Tensor) and x.untyped_storage().data_ptr() in addresses else x

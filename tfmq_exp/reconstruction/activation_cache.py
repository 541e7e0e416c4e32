"""Inputs and outputs of units over the calibration set, in memory up to a budget and on disk beyond."""

import itertools
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from tfmq_exp.core.batches import batches
from tfmq_exp.core.finite import require_finite


class SpillAllocator:
    """Allocates tensors: in memory while they fit the budget, then as files of a temporary folder.

    Args:
        budget: bytes of memory for all tensors that are alive together.
        folder: parent of the temporary folder (the system's by default).
    """

    def __init__(self, budget: int, folder: Path | None = None) -> None:
        self.budget, self.folder = budget, folder
        self.used = 0
        self._spill: tempfile.TemporaryDirectory[str] | None = None

    def allocate(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """An uninitialised tensor."""
        size = torch.Size(shape).numel()
        self.used += size * dtype.itemsize
        if self.used <= self.budget:
            return torch.empty(shape, dtype=dtype)
        self._spill = self._spill or tempfile.TemporaryDirectory(dir=self.folder, prefix="tfmq-cache-")
        name = tempfile.mktemp(dir=self._spill.name)
        return torch.from_file(name, shared=True, size=size, dtype=dtype).reshape(shape)

    def clear(self) -> None:
        """Release everything allocated; the files are deleted."""
        self.used = 0
        if self._spill is not None:
            self._spill.cleanup()
            self._spill = None


@dataclass(frozen=True)
class TensorIndex:
    """Placeholder of tensor number `index` in a template."""

    index: int


def has_samples(leaf: Any) -> bool:
    """Whether a leaf of a structure has a row for every sample; a single number is a constant."""
    return isinstance(leaf, Tensor) and leaf.dim() > 0


@dataclass
class TensorTree:
    """A nested structure over all samples: tensors with samples first, and a template with everything else as constants."""

    tensors: list[Tensor]
    template: Any

    @classmethod
    def like(cls, example: Any, samples: int, storage: SpillAllocator) -> "TensorTree":
        """Allocate `samples` samples of a structure of which `example` is one batch."""

        def allocate(leaf: Any) -> Any:
            if not has_samples(leaf):
                return leaf
            # the example's memory layout: floating-point sums depend on memory order, and must not depend on the cache
            order = [0, *sorted(range(1, leaf.dim()), key=leaf.stride, reverse=True)]
            stored = storage.allocate((samples, *(leaf.shape[dim] for dim in order[1:])), leaf.dtype)
            return stored.permute([order.index(dim) for dim in range(leaf.dim())])

        return cls.of(pytree.tree_map(allocate, example))

    @classmethod
    def of(cls, structure: Any) -> "TensorTree":
        """Wrap a structure that already has all samples."""
        tensors = [leaf for leaf in pytree.tree_leaves(structure) if has_samples(leaf)]
        indices = map(TensorIndex, itertools.count())
        return cls(tensors, pytree.tree_map(lambda leaf: next(indices) if has_samples(leaf) else leaf, structure))

    def write(self, start: int, batch: Any) -> None:
        """Store one batch at position `start`.

        Raises:
            NotFiniteError: a tensor with a NaN or an infinity, which no unit can learn from.
        """
        values = [leaf for leaf in pytree.tree_leaves(batch) if has_samples(leaf)]
        for stored, value in zip(self.tensors, values, strict=True):
            stored[start : start + len(value)] = require_finite(value.detach(), "a tensor on the calibration set")

    def __len__(self) -> int:
        return len(self.tensors[0])

    @property
    def whole(self) -> Any:
        """The structure with all samples."""
        return self.structure(self.tensors)

    def every(self, k: int) -> "TensorTree":
        """Every k-th sample."""
        return TensorTree([x[::k] for x in self.tensors], self.template)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(x.nbytes for x in self.tensors)

    def batches(self, size: int, device: torch.device) -> Iterator[Any]:
        """The structure for consecutive samples, `size` at a time."""
        for rows in batches(len(self), size):
            yield self.structure([x[rows.start : rows.stop].to(device) for x in self.tensors])

    def structure(self, tensors: Sequence[Tensor]) -> Any:
        """The structure around other tensors."""
        return pytree.tree_map(
            lambda leaf: tensors[leaf.index] if isinstance(leaf, TensorIndex) else leaf, self.template
        )


@dataclass
class RandomBatches:
    """`iterations` batches of rows drawn without replacement within each pass over the set, in chunks of `chunk` batches."""

    tensors: list[Tensor]
    batch: int
    iterations: int
    seed: int
    chunk: int = 10

    def __len__(self) -> int:
        return -(-self.iterations // self.chunk)

    def __iter__(self) -> Iterator[list[list[Tensor]]]:
        drawn = self.batches()
        while chunk := list(itertools.islice(drawn, self.chunk)):
            yield chunk

    def batches(self) -> Iterator[list[Tensor]]:
        """Batches one by one; all rows each time where there are no more than a batch has."""
        generator = torch.Generator().manual_seed(self.seed)
        samples = len(self.tensors[0])
        order = torch.empty(0, dtype=torch.long)
        for _ in range(self.iterations):
            if samples <= self.batch:
                yield self.tensors
                continue
            if len(order) < self.batch:
                order = torch.randperm(samples, generator=generator)
            rows, order = order[: self.batch], order[self.batch :]
            yield [x[rows] for x in self.tensors]

"""A unit's inputs and outputs over the calibration set, in memory up to a budget and on disk beyond."""

import itertools
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from tfmq_exp.core.finite import require_finite


class SpillAllocator:
    """Allocates tensors: in memory while they fit the budget, then as files of a temporary folder.

    Args:
        budget: bytes of memory for all tensors that are alive together.
        folder: where the files go when the budget is spent (the system's temporary folder by default).
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
        """Forget what was allocated; the files go away."""
        self.used = 0
        if self._spill is not None:
            self._spill.cleanup()
            self._spill = None


def has_samples(leaf: Any) -> bool:
    """Whether a leaf of a structure has a row for every sample; a single number is a constant."""
    return isinstance(leaf, Tensor) and leaf.dim() > 0


@dataclass
class TensorTree:
    """A nested structure over all samples: its tensors with the sample first, everything else as constants.

    `template` holds a tensor's position where the structure has a tensor, and the constant itself elsewhere.
    """

    tensors: list[Tensor]
    template: Any

    @classmethod
    def like(cls, example: Any, samples: int, storage: SpillAllocator) -> "TensorTree":
        """Room for `samples` samples of a structure of which `example` is one batch."""

        def room(leaf: Any) -> Any:
            if not has_samples(leaf):
                return leaf
            # in the example's memory layout: layers sum in the order of memory, and bits shall not depend on being stored
            order = [0, *sorted(range(1, leaf.dim()), key=leaf.stride, reverse=True)]
            stored = storage.allocate((samples, *(leaf.shape[dim] for dim in order[1:])), leaf.dtype)
            return stored.permute([order.index(dim) for dim in range(leaf.dim())])

        return cls.of(pytree.tree_map(room, example))

    @classmethod
    def of(cls, structure: Any) -> "TensorTree":
        """A structure that already holds all samples."""
        tensors = [leaf for leaf in pytree.tree_leaves(structure) if has_samples(leaf)]
        places = iter(range(len(tensors)))
        template = pytree.tree_map(lambda leaf: Place(next(places)) if has_samples(leaf) else leaf, structure)
        return cls(tensors, template)

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

    def batches(self, batch: int, device: torch.device) -> Iterator[Any]:
        """The structure for consecutive samples, `batch` at a time."""
        for start in range(0, len(self), batch):
            yield self.structure([x[start : start + batch].to(device) for x in self.tensors])

    def structure(self, tensors: Sequence[Tensor]) -> Any:
        """Tensors of some samples, in the structure that they came in."""
        return pytree.tree_map(lambda leaf: tensors[leaf.index] if isinstance(leaf, Place) else leaf, self.template)


@dataclass(frozen=True)
class Place:
    """Stands for the tensor number `index` in a template."""

    index: int


@dataclass
class RandomBatches:
    """`iterations` batches of rows drawn without replacement within each pass over the set, `together` at a time."""

    tensors: list[Tensor]
    batch: int
    iterations: int
    seed: int
    together: int = 10

    def __len__(self) -> int:
        return -(-self.iterations // self.together)

    def __iter__(self) -> Iterator[list[list[Tensor]]]:
        batches = self.batches()
        while chunk := list(itertools.islice(batches, self.together)):
            yield chunk

    def batches(self) -> Iterator[list[Tensor]]:
        """One after the other."""
        generator = torch.Generator().manual_seed(self.seed)
        samples = len(self.tensors[0])
        if samples <= self.batch:
            for _ in range(self.iterations):
                yield self.tensors
            return
        order = torch.empty(0, dtype=torch.long)
        for _ in range(self.iterations):
            if len(order) < self.batch:
                order = torch.randperm(samples, generator=generator)
            rows, order = order[: self.batch], order[self.batch :]
            yield [x[rows] for x in self.tensors]

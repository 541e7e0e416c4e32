"""Inputs and outputs of units over the calibration set, in memory up to a budget and on disk beyond."""

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from tfmq_exp.core.batches import batches
from tfmq_exp.reconstruction.cache_format import CacheFormat, decode, encode

CPU = torch.device("cpu")


class SpillAllocator:
    """Allocates tensors: on a device, then in memory, each up to a budget, then as files of a temporary folder.

    Memory beside a CUDA device is page-locked, and its rows are copied there while the device computes. Torch takes it in powers of
    two, which count against the budget.

    Args:
        budget: bytes of memory.
        folder: place of the temporary folder; None for the system's.
        device: that the networks are on.
        device_budget: bytes of its memory; 0 keeps nothing there.
        form: format of the activations that are stored in the tensors.
    """

    def __init__(
        self,
        budget: int,
        folder: Path | None = None,
        device: torch.device = CPU,
        device_budget: int = 0,
        form: CacheFormat = "float32",
    ) -> None:
        self.budget, self.folder, self.device, self.device_budget = budget, folder, device, device_budget
        self.form: CacheFormat = form
        self.page_locked = device.type == "cuda"
        self.used = self.device_used = self.spilled = 0  # bytes asked of memory, of the device, and in files
        self._spill: tempfile.TemporaryDirectory[str] | None = None
        self._files: dict[int, Path] = {}  # of the tensors that are in files, by their address

    @property
    def capacity(self) -> int:
        """Bytes that stay off the disk."""
        return self.budget + self.device_budget

    def allocate(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """An uninitialised tensor."""
        size = torch.Size(shape).numel()
        needed = size * dtype.itemsize
        if self.device_used + needed <= self.device_budget:
            self.device_used += needed
            return torch.empty(shape, dtype=dtype, device=self.device)
        self.used += self.memory(needed)
        if self.used <= self.budget:
            return torch.empty(shape, dtype=dtype, pin_memory=self.page_locked)
        self.spilled += needed
        self._spill = self._spill or tempfile.TemporaryDirectory(dir=self.folder, prefix="tfmq-cache-")
        name = tempfile.mktemp(dir=self._spill.name)
        stored = torch.from_file(name, shared=True, size=size, dtype=dtype).reshape(shape)
        self._files[stored.data_ptr()] = Path(name)
        return stored

    def memory(self, needed: int) -> int:
        """Bytes of memory that so many bytes take."""
        return 1 << (needed - 1).bit_length() if self.page_locked else needed

    def release(self, stored: Tensor) -> None:
        """Take back the room of one tensor that is not read any more; its file is deleted."""
        if stored.device.type != "cpu":
            self.device_used -= stored.nbytes
            return
        self.used -= self.memory(stored.nbytes)
        if file := self._files.pop(stored.data_ptr(), None):
            self.spilled -= stored.nbytes
            file.unlink()

    def clear(self) -> None:
        """Release everything allocated; the files are deleted."""
        self._files.clear()
        self.used = self.device_used = self.spilled = 0
        if self._spill is not None:
            self._spill.cleanup()
            self._spill = None


def has_samples(leaf: Any) -> bool:
    """Whether a leaf of a structure has a row for every sample; a single number is a constant, as is what is `Shared`."""
    return isinstance(leaf, Tensor) and leaf.dim() > 0


@dataclass(frozen=True)
class Shared:
    """A tensor that all samples share: rotary tables, positions."""

    tensor: Tensor


def mark_shared(tree: Any, shared: Sequence[bool]) -> Any:
    """A structure with the leaves for which `shared` says so as `Shared`; itself where nothing is said."""
    if not any(shared):
        return tree
    leaves, spec = pytree.tree_flatten(tree)
    marked = [Shared(leaf) if same else leaf for leaf, same in zip(leaves, shared, strict=True)]
    return pytree.tree_unflatten(marked, spec)


class Folded(NamedTuple):
    """A tensor with several consecutive rows for each sample, as [samples, rows, ...]: frames or words that a layer sees alone."""

    rows: Tensor


def fold(tree: Any, samples: int) -> Any:
    """A structure with tensors of more rows than there are samples as `Folded`."""

    def leaf(x: Any) -> Any:
        if not has_samples(x) or len(x) == samples or len(x) % samples:
            return x
        return Folded(x.unflatten(0, (samples, -1)))

    return pytree.tree_map(leaf, tree)


def without_last(tree: Any, samples: int, further: int) -> Any:
    """A structure without the rows of `further` samples after the first ones."""

    def leaf(x: Any) -> Any:
        if not has_samples(x) or not further or len(x) % (samples + further):
            return x
        return x[: len(x) // (samples + further) * samples]

    return pytree.tree_map(leaf, tree)


def unfold(tree: Any) -> Any:
    """The structure as the network has it: `Folded` and `Shared` are plain tensors again."""

    def leaf(x: Any) -> Any:
        return x.rows.flatten(0, 1) if isinstance(x, Folded) else x.tensor if isinstance(x, Shared) else x

    return pytree.tree_map(leaf, tree, is_leaf=lambda x: isinstance(x, Folded))


def shared_leaves(one: Any, two: Any) -> list[bool]:
    """The leaves of a structure that are tensors of one shape for one sample and for two."""
    pairs = zip(pytree.tree_leaves(one), pytree.tree_leaves(two), strict=True)
    return [isinstance(a, Tensor) and a.dim() > 0 and a.shape == b.shape for a, b in pairs]


@dataclass(frozen=True)
class TensorTree:
    """A nested structure over all samples: tensors with samples first, and everything else as constants.

    Its tensors are stored in `form`, and come out as they were put in, as far as the format holds them.
    """

    whole: Any
    form: CacheFormat = "float32"

    @classmethod
    def like(cls, example: Any, samples: int, storage: SpillAllocator) -> "TensorTree":
        """Allocate `samples` samples of a structure of which `example` is one batch, in the storage's format."""

        def allocate(leaf: Any) -> Any:
            if not has_samples(leaf):
                return leaf
            # the example's memory layout: floating-point sums depend on memory order, and must not depend on the cache
            order = [0, *sorted(range(1, leaf.dim()), key=leaf.stride, reverse=True)]
            stored = storage.allocate((samples, *(leaf.shape[dim] for dim in order[1:])), leaf.dtype)
            return stored.permute([order.index(dim) for dim in range(leaf.dim())])

        return cls(pytree.tree_map(allocate, encode(example, storage.form)), storage.form)

    @property
    def tensors(self) -> list[Tensor]:
        """The stored tensors that have samples."""
        return [leaf for leaf in pytree.tree_leaves(self.whole) if has_samples(leaf)]

    @property
    def nbytes(self) -> int:
        """Bytes of the stored tensors."""
        return sum(x.nbytes for x in self.tensors)

    def around(self, tensors: Sequence[Tensor]) -> Any:
        """The structure around other stored tensors."""
        given = iter(tensors)
        return pytree.tree_map(lambda leaf: next(given) if has_samples(leaf) else leaf, self.whole)

    def structure(self, tensors: Sequence[Tensor]) -> Any:
        """The structure around rows of the stored tensors, as they were before they were stored."""
        return unfold(decode(self.around(tensors)))

    def write(self, start: int, batch: Any) -> None:
        """Store one batch at position `start`.

        Raises:
            NotFiniteError: a NaN or an infinity, which no unit can learn from.
            ValueError: samples of another shape than those before.
        """
        values, stored = TensorTree(encode(batch, self.form)).tensors, self.tensors
        shapes, expected = ([tuple(x.shape[1:]) for x in tensors] for tensors in (values, stored))
        if shapes != expected:
            raise ValueError(
                f"samples have tensors of shapes {shapes} where those before had {expected}: a network that pads to the longest "
                "text of a batch needs texts of one length"
            )
        for tensor, value in zip(stored, values, strict=True):
            tensor[start : start + len(value)] = value

    def __len__(self) -> int:
        return len(self.tensors[0])

    def thinned(self, count: int) -> "TensorTree":
        """Every k-th sample: `count` of them, or up to twice as many."""
        return TensorTree(self.around([x[:: max(1, len(self) // count)] for x in self.tensors]), self.form)

    def batches(self, size: int, device: torch.device) -> Iterator[Any]:
        """The structure for consecutive samples, `size` at a time."""
        for rows in batches(len(self), size):
            yield self.structure([x[rows.start : rows.stop].to(device) for x in self.tensors])

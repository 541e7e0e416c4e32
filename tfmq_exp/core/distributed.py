"""Processes that make one run together; results are those of a single process, to the bit."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import reduce
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:  # torch is imported where it is needed: a store is opened, and a finished job found, without it
    from jaxtyping import Float
    from torch import Tensor

T = TypeVar("T")
GROUP_TIMEOUT = timedelta(days=7)  # the others wait for as long as the main process works alone


@dataclass(frozen=True)
class ProcessGroup:
    """This process among those of the run; a single process by default.

    All run the same stages in the same order. Trajectories, images, features and microbatches are sharded; everything else is
    computed by each process, and only the main process writes.
    """

    rank: int = 0
    world_size: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.world_size:
            right = f"the rank of one of {self.world_size} processes is 0 to {self.world_size - 1}"
            raise ValueError(f"{right}, got {self.rank}")

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which writes files and reports progress."""
        return self.rank == 0

    def shard(self, items: Sequence[T]) -> Sequence[T]:
        """This rank's share of items that all ranks know."""
        return items[self.rank :: self.world_size]

    def gather(self, value: T) -> list[T]:
        """The values of all ranks, in their order."""
        values = [value] * self.world_size
        if self.world_size > 1:
            import torch.distributed as dist

            dist.all_gather_object(values, value)
        return values

    def broadcast(self, value: T) -> T:
        """The value of rank 0."""
        return self.gather(value)[0]

    def barrier(self) -> None:
        """Wait for all ranks."""
        self.gather(None)

    def ordered_all_reduce(self, own: Sequence[Float[Tensor, "n"]], count: int) -> Float[Tensor, "n"]:
        """Sum of `count` vectors in index order, regardless of which rank holds them: bit-identical for any world size.

        The mean over ranks that DistributedDataParallel takes depends on their number in the last bits, and the gradients of
        learned scales, which jump, amplify that.

        `own` are the vectors of this rank, as `shard` distributes them; one that is not counted where it has no share.
        """
        if self.world_size == 1:
            return ordered_sum(own[:count])
        import torch
        import torch.distributed as dist

        mine = own[0].new_zeros(-(-count // self.world_size), len(own[0]))
        for row, vector in zip(mine, own, strict=False):
            row.copy_(vector)
        gathered = [torch.empty_like(mine) for _ in range(self.world_size)]
        dist.all_gather(gathered, mine)
        return ordered_sum([gathered[i % self.world_size][i // self.world_size] for i in range(count)])

    def check_same(self, what: str, values: Float[Tensor, "n"]) -> None:
        """Raise RuntimeError where the values of some rank differ from those of another, as on machines of several kinds."""
        gathered = self.gather((float(values.double().sum()), float(values.double().square().sum())))
        if any(other != gathered[0] for other in gathered):
            raise RuntimeError(f"{what} differs between processes: {gathered}; use machines of one kind")


ALONE = ProcessGroup()


def ordered_sum(vectors: Sequence[Float[Tensor, "n"]]) -> Float[Tensor, "n"]:
    """Sum from the first vector to the last."""
    return reduce(operator.add, vectors)


def summed_gradients(
    parameters: Sequence[Tensor], count: int, processes: ProcessGroup, compute: Callable[[int], Sequence[Tensor]]
) -> Float[Tensor, "n"]:
    """Gradients and loss of a batch as one vector: the sum over microbatches, in their order for any number of processes.

    `compute` gives, for one of `count` microbatches, the gradient of every parameter and, last, its share of the loss.
    """
    import torch

    vectors: list[Tensor] = []
    for index in processes.shard(range(count)):
        vectors.append(concatenated(compute(index)))
        if processes.world_size == 1:
            vectors = [ordered_sum(vectors)]  # the sum in the same order, without keeping its terms
    if not vectors:  # this rank has no share
        vectors = [torch.zeros(sum(p.numel() for p in parameters) + 1, device=parameters[0].device)]
    return processes.ordered_all_reduce(vectors, count if processes.world_size > 1 else 1)


def concatenated(tensors: Sequence[Tensor]) -> Tensor:
    """All elements as one vector."""
    import torch

    return torch.cat([x.flatten() for x in tensors])


@contextmanager
def init_process_group(rank: int, world_size: int, init_file: Path) -> Iterator[ProcessGroup]:
    """Join the processes of this machine through a file that does not exist before, as `torch.distributed` does."""
    import torch
    import torch.distributed as dist

    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    method = f"file://{init_file}"
    dist.init_process_group(backend, init_method=method, rank=rank, world_size=world_size, timeout=GROUP_TIMEOUT)
    try:
        yield ProcessGroup(rank, world_size)
    finally:
        dist.destroy_process_group()

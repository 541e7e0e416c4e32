"""Several processes that make one run together: each does its share, all end with the bits that one alone would have."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:  # torch is imported where it is needed: a store is opened, and a finished job found, without it
    from jaxtyping import Float
    from torch import Tensor

T = TypeVar("T")
GROUP_TIMEOUT = timedelta(days=7)  # a process may wait for as long as another works alone


@dataclass(frozen=True)
class ProcessGroup:
    """This process among those of the run; alone by default.

    All run the same stages in the same order. What divides (trajectories, images, features, gradients) is shared out; the
    rest each does for itself, and only the first writes.

    Args:
        rank: of this process, from 0.
        world_size: number of processes.
    """

    rank: int = 0
    world_size: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.world_size:
            raise ValueError(
                f"the rank of one of {self.world_size} processes is 0 to {self.world_size - 1}, got {self.rank}"
            )

    @property
    def is_main(self) -> bool:
        """Whether this one writes and speaks."""
        return self.rank == 0

    def shard(self, items: Sequence[T]) -> Sequence[T]:
        """This process's share of items that all know."""
        return items[self.rank :: self.world_size]

    def broadcast(self, value: T) -> T:
        """What the first process says, whatever the others would."""
        if self.world_size == 1:
            return value
        import torch.distributed

        said: list[Any] = [value]
        torch.distributed.broadcast_object_list(said, src=0)
        return said[0]

    def barrier(self) -> None:
        """Until all are here."""
        if self.world_size > 1:
            import torch.distributed

            torch.distributed.all_gather_object([None] * self.world_size, None)

    def ordered_all_reduce(self, own: Sequence[Float[Tensor, "n"]], parts: int) -> Float[Tensor, "n"]:
        """The sum of `parts` vectors, added up in their order whoever has them: the same bits for any number of processes.

        A mean over processes, which DistributedDataParallel takes, would depend on their number in the last bits, and
        learned scales, whose gradients jump, make more of that.

        Args:
            own: this process's share of the vectors; at least one, also where it has no share (it is not counted then).
            parts: how many vectors there are in all.
        """
        if self.world_size == 1:
            return add_up(own[:parts])
        import torch.distributed

        each = -(-parts // self.world_size)
        mine = torch.zeros(each, len(own[0]), dtype=own[0].dtype, device=own[0].device)
        for row, vector in zip(mine, own, strict=False):
            row.copy_(vector)
        gathered = [torch.empty_like(mine) for _ in range(self.world_size)]
        torch.distributed.all_gather(gathered, mine)
        return add_up([gathered[part % self.world_size][part // self.world_size] for part in range(parts)])

    def check_same(self, what: str, values: Float[Tensor, "n"]) -> None:
        """Processes on machines that compute differently would drift apart unnoticed.

        Raises:
            RuntimeError: the values of some process differ from those of the first.
        """
        mine = (float(values.double().sum()), float(values.double().square().sum()))
        seen: list[Any] = [mine] * self.world_size
        if self.world_size > 1:
            import torch.distributed

            torch.distributed.all_gather_object(seen, mine)
        if any(other != seen[0] for other in seen):
            raise RuntimeError(f"{what} differs between processes: {seen}; use machines of one kind, or one process")


ALONE = ProcessGroup()


def add_up(vectors: Sequence[Float[Tensor, "n"]]) -> Float[Tensor, "n"]:
    """One after the other."""
    total = vectors[0]
    for vector in vectors[1:]:
        total = total + vector
    return total


@contextmanager
def joined(rank: int, count: int, meeting: Path) -> Iterator[ProcessGroup]:
    """Be one of several processes on this machine.

    Args:
        rank: of this process, from 0.
        count: of all.
        meeting: a file that does not exist yet, where they find each other.
    """
    import torch.distributed

    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    torch.distributed.init_process_group(
        backend, init_method=f"file://{meeting}", rank=rank, world_size=count, timeout=GROUP_TIMEOUT
    )
    try:
        yield ProcessGroup(rank, count)
    finally:
        torch.distributed.destroy_process_group()

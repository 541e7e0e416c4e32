"""Random batches of cached activations: their rows, and the rows' tensors on the device that learns."""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

Rows = Int[Tensor, "batch"]
ROW_BYTES = 2**16  # from here on a row's own copy costs less than gathering it


@dataclass(frozen=True)
class RandomRows:
    """`iterations` batches of rows, drawn without replacement within each pass over them, in chunks of `chunk` batches."""

    rows: Rows
    batch: int
    iterations: int
    seed: int
    chunk: int = 25

    def __len__(self) -> int:
        return -(-self.iterations // self.chunk)

    def __iter__(self) -> Iterator[list[Rows]]:
        drawn = self.batches()
        while chunk := list(itertools.islice(drawn, self.chunk)):
            yield chunk

    def batches(self) -> Iterator[Rows]:
        """Batches one by one; all rows each time where there are no more than a batch has."""
        generator, order = torch.Generator().manual_seed(self.seed), self.rows[:0]
        for _ in range(self.iterations):
            if len(self.rows) <= self.batch:
                yield self.rows
                continue
            if len(order) < self.batch:
                order = self.rows[torch.randperm(len(self.rows), generator=generator)]
            batch, order = order[: self.batch], order[self.batch :]
            yield batch


def load_batches(tensors: Sequence[Tensor], batches: Sequence[Rows], device: torch.device) -> Iterator[list[Tensor]]:
    """The rows' tensors of each batch on the device. On CUDA, a batch is copied while the one before it is used."""
    if device.type != "cuda":
        for rows in batches:
            yield [select(x, rows) for x in tensors]
        return
    copies, ahead = torch.cuda.Stream(device), list[list[Tensor]]()
    copies.wait_stream(torch.cuda.current_stream(device))  # it has written the tensors that are on the device
    for rows in [*batches, None]:
        ready = ahead.pop() if ahead else None
        torch.cuda.current_stream(device).wait_stream(copies)
        if rows is not None:
            with torch.cuda.stream(copies):
                ahead.append([select_to(x, rows, device) for x in tensors])
        if ready is not None:
            for x in ready:  # its memory is not given away before the stream that uses it has come so far
                x.record_stream(torch.cuda.current_stream(device))
            yield ready


def select(x: Tensor, rows: Rows) -> Tensor:
    """The rows of a tensor, in its memory layout."""
    return x.index_select(0, rows) if x.is_contiguous() else x[rows]  # the first takes half the time, but no layout


def select_to(x: Tensor, rows: Rows, device: torch.device) -> Tensor:
    """The rows of a tensor on a CUDA device, without waiting for a copy.

    On the device they are gathered there. Large rows of page-locked memory are copied one by one, which keeps the processor out of it;
    others are gathered by the processor first.
    """
    if x.is_cuda:
        return select(x, rows.to(device, non_blocking=True))
    if x[0].nbytes < ROW_BYTES or not x.is_pinned():
        return select(x, rows).pin_memory().to(device, non_blocking=True)
    selected = torch.empty_like(x[: len(rows)], device=device)
    for place, row in enumerate(rows.tolist()):
        selected[place].copy_(x[row], non_blocking=True)
    return selected

"""Time and memory of a few passes or iterations on this machine."""

import time
import weakref
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from tfmq_exp.core.distributed import ALONE
from tfmq_exp.reconstruction.loop import ReconstructionContext, reconstruct
from tfmq_exp.reconstruction.module import ReconstructionConfig
from tfmq_exp.reconstruction.units import Unit

BUDGET = 0.5  # seconds of a measured pass or iteration; with fewer rows if it would take longer


class PeakMemory(TorchDispatchMode):
    """Peak bytes of the tensors made inside the block; workspaces of kernels are not seen."""

    def __init__(self) -> None:
        super().__init__()
        self.alive: dict[int, int] = {}
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given = {x.untyped_storage()._cdata for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        for storage in (x.untyped_storage() for x in pytree.tree_leaves(out) if isinstance(x, Tensor)):
            if storage._cdata not in given | self.alive.keys():
                self.alive[storage._cdata] = storage.nbytes()
                weakref.finalize(storage, self.alive.pop, storage._cdata, None)
        self.bytes = max(self.bytes, sum(self.alive.values()))
        return out


class Cost(NamedTuple):
    """Seconds and peak bytes of some rows that are computed together."""

    seconds: float
    bytes: float


def measure(work: Callable[[int], object], rows: int, available: int | None = None, least: int = 1) -> Cost:
    """Cost of `work(rows)`; where that is slow it is extrapolated from as many rows as the budget allows.

    Args:
        work: computes so many rows.
        rows: whose cost is asked for.
        available: most rows that can be computed.
        least: rows that are computed however slow, 2 where a part of the cost does not depend on their number.
    """

    def once(count: int) -> Cost:
        began = now()
        with PeakMemory() as memory:  # which also warms up
            work(count)
        if (seconds := now() - began) < BUDGET:
            seconds = min(timed(count) for _ in range(2))
        return Cost(seconds, memory.bytes)

    def timed(count: int) -> float:
        began = now()
        work(count)
        return now() - began

    one = once(1)
    few = min(rows, available or rows, max(least, int(BUDGET / max(one.seconds, 1e-9))))
    if few <= 1:
        return Cost(rows * one.seconds, rows * one.bytes)
    pairs = zip(one, once(few), strict=True)
    return Cost(*(b + max(0.0, b - a) * (rows - few) / (few - 1) for a, b in pairs))


def now() -> float:
    """Synchronize the accelerator, if there is one, and return the time in seconds."""
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
    return time.perf_counter()


class FirstIterations:
    """Trainer that measures a few iterations of a unit in place of all, and the factory that makes it."""

    def __init__(self, rows: int) -> None:
        self.rows = rows  # of an iteration
        self.costs: list[Cost] = []

    def __call__(self, **_: Any) -> "FirstIterations":
        """Make the trainer of the next unit."""
        return self

    def fit(self, module: Any, batches: Any) -> None:
        """Measure iterations on rows of the first batch."""
        optimizer, batch = module.configure_optimizers(), next(iter(batches))[0]
        module.iteration = module.config.iterations // 2  # where the rounding penalty is on
        available = len(batch[0])
        self.costs.append(
            measure(lambda n: module.iterate(optimizer, [x[:n] for x in batch]), self.rows, available, least=2)
        )


class NoCallbacks:
    """A unit checkpointer and progress display whose methods do nothing."""

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *_: None


def measure_units(
    context: Sequence[Any], units: Sequence[Unit], recipe: ReconstructionConfig, rows: int
) -> dict[str, Cost]:
    """Cost of an iteration of each unit, by name, as the learning loop runs it.

    Args:
        context: the first fields of a `ReconstructionContext`: model, float network, structure, data, compute, seed.
        units: all of them can learn.
        recipe: of the learning.
        rows: of an iteration; the data may have fewer.
    """
    model, float_unet, structure, data, compute, seed = context
    trainer, callbacks = FirstIterations(rows), NoCallbacks()
    compute = replace(compute, trainer=trainer, processes=ALONE)
    given: Any = (model, float_unet, structure, data, compute, seed, callbacks, callbacks)
    reconstruct(ReconstructionContext(*given), units, recipe)
    return {unit.name: cost for unit, cost in zip(units, trainer.costs, strict=True)}

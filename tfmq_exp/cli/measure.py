"""What one forward pass and one iteration of learning cost on this machine, from a few of them."""

import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from tfmq_exp.quant.quantizers.base import Mode, modes
from tfmq_exp.quant.rounding import AdaRound, rounding_penalty
from tfmq_exp.reconstruction.activation_cache import RandomBatches, TensorTree
from tfmq_exp.reconstruction.capture import UnitActivations, hooks
from tfmq_exp.reconstruction.learning import quantizers_of, trainable_parameters
from tfmq_exp.reconstruction.module import BlockReconstruction, ReconstructionConfig
from tfmq_exp.reconstruction.units import Unit
from tfmq_exp.surgery.quantized_unet import QuantizedUNet

PASS = 0.5  # seconds that a measured forward pass may take, if fewer rows make it shorter
ITERATION = 0.25  # the same of an iteration of a unit
PATIENCE = 4.0  # seconds after which no further unit's learning is measured; the rest cost what their kind costs
PATIENCE_PASSES = 10  # the same in forward passes of one row, for networks of which one takes seconds


Clock = Callable[[], float]  # seconds since some moment


class LiveTensors(TorchDispatchMode):
    """Counts the bytes of tensors that are made inside the block; what kernels use for themselves is not seen."""

    def __init__(self) -> None:
        super().__init__()
        self.alive, self.peak = 0, 0
        self.known: set[int] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run the operation and count the storage of what it returns, unless it is an argument's."""
        given = {storage_of(leaf) for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        out = func(*args, **(kwargs or {}))
        for leaf in pytree.tree_leaves(out):
            if isinstance(leaf, Tensor) and storage_of(leaf) not in given | self.known:
                self._count(leaf.untyped_storage())
        return out

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        self.known.add(key)
        self.alive += size
        self.peak = max(self.peak, self.alive)
        weakref.finalize(storage, self._gone, key, size)

    def _gone(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.alive -= size


def storage_of(tensor: Tensor) -> int:
    """What identifies the memory behind a tensor."""
    return tensor.untyped_storage()._cdata


def wall_clock(device: torch.device) -> Clock:
    """Seconds, after everything that the device was asked to do."""

    def now() -> float:
        if device.type != "cpu":
            torch.accelerator.synchronize(device)
        return time.perf_counter()

    return now


@dataclass(frozen=True)
class Span:
    """When a module runs within a forward pass, in seconds per row from its beginning."""

    start: float
    end: float

    @property
    def seconds(self) -> float:
        """How long it runs."""
        return self.end - self.start


@dataclass(frozen=True)
class Pass:
    """A forward pass, per row: seconds, the most bytes of intermediate tensors, and when modules run."""

    seconds: float
    memory: int
    spans: Mapping[str, Span]

    def shared(self, rows: int) -> "Pass":
        """The same where what was counted as one row are several."""
        spans = {name: Span(span.start / rows, span.end / rows) for name, span in self.spans.items()}
        return Pass(self.seconds / rows, self.memory // rows, spans)


def measure_pass(call: Callable[[int], object], most: int, now: Clock, modules: Mapping[str, nn.Module]) -> Pass:
    """The fastest of a few forward passes `call(rows)`; with one row if that takes long, else with up to `most`."""
    marks: dict[str, list[float]] = {}

    def mark(name: str) -> None:
        marks.setdefault(name, []).append(now())

    def once(rows: int) -> Pass:
        marks.clear()
        began = now()
        call(rows)
        seconds = (now() - began) / rows
        return Pass(
            seconds, live.peak, {n: Span((m[0] - began) / rows, (m[-1] - began) / rows) for n, m in marks.items()}
        )

    with torch.no_grad(), LiveTensors() as live:
        call(1)  # which also warms up
    handles = [m.register_forward_pre_hook(lambda *_, name=name: mark(name)) for name, m in modules.items()]
    handles += [m.register_forward_hook(lambda *_, name=name: mark(name)) for name, m in modules.items()]
    with torch.no_grad(), hooks(handles):
        first = once(1)
        rows = rows_for(first.seconds, PASS, most)
        return first if rows == 1 else min((once(rows) for _ in range(2)), key=lambda found: found.seconds)


def rows_for(seconds: float, limit: float, most: int) -> int:
    """How many rows of so many seconds each fit a limit; at least one."""
    return max(1, min(most, int(limit / max(seconds, 1e-9))))


@dataclass(frozen=True)
class UnitCost:
    """What one unit costs.

    Args:
        name, kind, driver: the unit's.
        weights: that it learns.
        span: when the float unit runs. A unit that is driven by timesteps is in no forward pass; its span starts at 0.
        fed, returned: bytes per row.
        row, fixed: seconds of an iteration: for every row, and for the weights alone; None where it was not measured.
        row_memory, fixed_memory: bytes in the same two parts.
    """

    name: str
    kind: str
    driver: str
    weights: int
    span: Span
    fed: int
    returned: int
    row: float | None = None
    fixed: float = 0.0
    row_memory: int = 0
    fixed_memory: int = 0

    def iteration(self, batch: int) -> float:
        """Seconds of one iteration with `batch` rows."""
        return self.fixed + batch * (self.row or 0.0)

    def learning_memory(self, batch: int) -> int:
        """Bytes at the peak of one iteration with `batch` rows, the rounding variables and Adam's moments included."""
        return self.fixed_memory + batch * self.row_memory


def measure_unit(
    unit: Unit, network: nn.Module, view: UnitActivations, span: Span | None, weights: int, now: Clock
) -> UnitCost:
    """A unit without its learning."""
    assert view.inputs is not None
    rows = len(view.inputs)
    if span is None:
        module, (t, _, _) = unit.module(network), view.inputs.whole
        t = t.to(next(network.parameters()).device)
        span = Span(0.0, measure_pass(lambda n: module(t[:n]), rows, now, {}).seconds)
    sizes = view.inputs.nbytes // rows, view.outputs.nbytes // rows
    return UnitCost(unit.name, unit.kind.value, unit.driver, weights, span, *sizes)


class Lesson:
    """The learning of one unit, iteration by iteration, as a trainer would run it."""

    def __init__(self, model: QuantizedUNet, unit: Unit, view: UnitActivations, recipe: ReconstructionConfig) -> None:
        assert view.inputs is not None
        fed = {origin: view.inputs.whole for origin in recipe.inputs.origins}
        self.samples = TensorTree.of({"inputs": fed, "targets": view.outputs.whole, "importance": None})
        self.device = next(model.parameters()).device
        self.roundings: list[AdaRound] = []
        if recipe.rounding:
            self.roundings = [rounding for site in unit.sites for rounding in model.learn_rounding(site)]
        self.sources = [quantizer.source for quantizer in quantizers_of(model, unit, recipe).values()]
        structure = self.samples.structure
        self.module = BlockReconstruction(
            unit.module(model.unet), model.context, self.roundings, self.sources, structure, recipe
        )
        self.optimizer = self.module.configure_optimizers()

    def iterate(self) -> None:
        """One iteration on all rows."""
        order = torch.randperm(len(self.samples))
        self.module.iteration = self.module.config.iterations - 1  # where the penalty is on, as it is most of the time
        self.module.iterate(self.optimizer, [x[order].to(self.device) for x in self.samples.tensors])

    def iterate_weights(self) -> None:
        """What of an iteration does not depend on the rows: the weights' own part."""
        # the square asks for what a layer does: the weight to be kept, and a gradient of its size
        outputs = torch.stack([rounding.weight().square().sum() for rounding in self.roundings]).sum()
        loss = outputs + rounding_penalty(torch.cat([r.h.flatten() for r in self.roundings]), 2.0)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()


@contextmanager
def lesson_on(
    model: QuantizedUNet, unit: Unit, view: UnitActivations, recipe: ReconstructionConfig
) -> Iterator[Lesson]:
    """A unit that is ready to learn; afterwards nothing is left of it."""
    inside = list(model.activation_quantizers_in(unit.name, unit.sites).values())
    sources = [quantizer.source for quantizer in quantizers_of(model, unit, recipe).values()]
    quantizers = model.weight_quantizers(unit.sites) if recipe.rounding else []
    with modes(quantizers, Mode.QUANTIZE), trainable_parameters(sources, 0), recipe.inputs.learning_context(inside):
        try:
            yield Lesson(model, unit, view, recipe)
        finally:
            for quantizer in quantizers:
                quantizer.rounding = None


def timed(work: Callable[[], object], now: Clock) -> float:
    """Seconds of the faster of two runs, or of the first if that takes longer than an iteration may."""
    best = float("inf")
    for _ in range(2):
        began = now()
        work()
        best = min(best, now() - began)
        if best > ITERATION:
            break
    return best


def measure_learning(
    cost: UnitCost,
    model: QuantizedUNet,
    unit: Unit,
    view: UnitActivations,
    recipe: ReconstructionConfig,
    batch: int,
    now: Clock,
) -> UnitCost:
    """The same unit with what its learning costs: on all rows of the view, of which a real batch may have more."""
    rows = len(view.outputs)
    fixed, fixed_memory = 0.0, 0
    with LiveTensors() as live, lesson_on(model, unit, view, recipe) as lesson:
        apart = bool(lesson.roundings) and rows < batch
        if apart:
            lesson.iterate_weights()
            fixed_memory = live.peak
        lesson.iterate()
    with lesson_on(model, unit, view, recipe) as lesson:
        if apart:
            fixed = timed(lesson.iterate_weights, now)
        seconds = timed(lesson.iterate, now)
    return replace(
        cost,
        row=max(0.0, seconds - fixed) / rows,
        fixed=fixed,
        row_memory=max(0, live.peak - fixed_memory) // rows,
        fixed_memory=fixed_memory,
    )


def measure_setup(
    model: QuantizedUNet,
    unit: Unit,
    view: UnitActivations,
    recipe: ReconstructionConfig,
    trainer: Callable[..., Any],
    now: Clock,
) -> float:
    """Seconds that a trainer takes for a unit beside the iterations."""
    with lesson_on(model, unit, view, recipe) as lesson:
        samples = lesson.samples.tensors

        def fit() -> None:
            trainer(max_epochs=1).fit(lesson.module, RandomBatches(samples, len(samples[0]), 1, 0))
            lesson.module.to(lesson.device)

        return max(0.0, timed(fit, now) - timed(lesson.iterate, now))


def like_their_kind(costs: Sequence[UnitCost]) -> list[UnitCost]:
    """Units whose learning was not measured, in proportion to measured ones of their kind, or of all kinds if there are none.

    What a row costs goes with the forward pass and the size of what is passed, what the weights cost with their number.
    """

    def completed(cost: UnitCost) -> UnitCost:
        if cost.row is not None:
            return cost
        measured = [other for other in costs if other.row is not None]
        models = [other for other in measured if other.kind == cost.kind] or measured
        by_row = cost.span.seconds / sum(other.span.seconds for other in models)
        by_weight = cost.weights / sum(other.weights for other in models)
        by_size = (cost.fed + cost.returned) / sum(other.fed + other.returned for other in models)
        return replace(
            cost,
            row=by_row * sum(other.row or 0.0 for other in models),
            fixed=by_weight * sum(other.fixed for other in models),
            row_memory=round(by_size * sum(other.row_memory for other in models)),
            fixed_memory=round(by_weight * sum(other.fixed_memory for other in models)),
        )

    return [completed(cost) for cost in costs]


def dearest_first(costs: Sequence[UnitCost]) -> list[UnitCost]:
    """The dearest unit of each kind, then the others, the dearest first."""
    ordered = sorted(costs, key=lambda cost: cost.span.seconds, reverse=True)
    heads = {cost.kind: cost for cost in reversed(ordered)}
    return sorted(ordered, key=lambda cost: heads[cost.kind] is not cost)

"""Activations at every network call of the float model, compared with the ranges of their quantizers.

As figures 2 to 4 of TDQ (arXiv 2306.02316) ask: do activations change along the trajectory, and does the scale follow?
"""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from tfmq_exp.core.batches import batches
from tfmq_exp.core.finite import require_finite
from tfmq_exp.core.seeds import Stream
from tfmq_exp.denoisers.denoiser import Denoiser
from tfmq_exp.denoisers.structure import NetworkStructure
from tfmq_exp.diagnostics.rows import Row, grouped
from tfmq_exp.diagnostics.sensitivity import float_units, quantized_units
from tfmq_exp.quant.functional import SMALLEST_SCALE
from tfmq_exp.quant.quantizers import AffineQuantizer
from tfmq_exp.quant.spec import QParams, QuantSpec
from tfmq_exp.sampling.guidance import Sampling
from tfmq_exp.surgery.quantized_network import QuantizedNetwork

MAX_VALUES = 2**15  # of an activation and call that quantiles are computed of: the rank of q99 is off by 0.06 %


@dataclass
class ActivationStats:
    """Statistics of one activation during one network call, batch after batch, in bounded memory."""

    spec: QuantSpec  # the quantizer's grid
    batches: list[list[float]] = field(default_factory=list)  # the columns of each batch, in the order of `columns`
    drawn: list[Tensor] = field(default_factory=list)  # values that quantiles are computed of

    def add(self, x: Tensor, q: QParams, max_values: int, generator: torch.Generator) -> None:
        """Add a batch with its quantizer's parameters; at most `max_values` are kept, drawn with replacement, for quantiles."""
        x, qmin, qmax = x.detach().float(), self.spec.qmin, self.spec.qmax
        low, high = x.aminmax()
        require_finite(torch.stack([low, high]), "an activation while sampling")  # which no comparison would show
        codes = (x / q.scale).round_().add_(q.zero_point)
        outside = (codes < qmin).logical_or_(codes > qmax).sum()
        ends = (q.scale * (qmin - q.zero_point)).min(), (q.scale * (qmax - q.zero_point)).max()
        moments = x.sum(dtype=torch.float64), x.square().sum(dtype=torch.float64)
        row = (low, high, *moments, outside, *ends, q.scale.sum())
        self.batches.append([*torch.stack([value.double() for value in row]).tolist(), x.numel(), q.scale.numel()])
        values = x.flatten()
        if values.numel() > max_values:
            values = values[torch.randint(values.numel(), (max_values,), generator=generator).to(x.device)]
        self.drawn.append(values.cpu())

    def columns(self) -> dict[str, Any]:
        """All statistics, by the names of the table's columns."""
        low, high, total, squares, outside, grid_low, grid_high, scale, count, rows = zip(*self.batches, strict=True)
        mean = sum(total) / sum(count)
        q01, q99 = torch.cat(self.drawn).quantile(torch.tensor([0.01, 0.99])).tolist()
        return {
            **{"min": min(low), "q01": q01, "mean": mean, "q99": q99, "max": max(high)},
            "std": max(0.0, sum(squares) / sum(count) - mean**2) ** 0.5,
            **{"grid_min": min(grid_low), "grid_max": max(grid_high)},
            **{"interval": sum(scale) / sum(rows), "clipped": sum(outside) / sum(count)},
        }


def activation_ranges(
    model: QuantizedNetwork,
    denoiser: Denoiser,
    structure: NetworkStructure,
    sampling: Sampling,
    *,
    images: int,
    seed: int,
    batch: int,
    each_call: Callable[[int], None] = lambda _: None,
) -> list[Row]:
    """Statistics of every quantized activation at every network call of the float model, in one pass over the trajectories.

    All trajectories advance together, batch after batch, so that the values of one call are all that is kept.

    Args:
        model: the finished model, whose quantizers are compared with; none of them acts.
        denoiser: the float network.
        structure: its parts.
        sampling: its sampling; under guidance both halves of a batch count.
        images: trajectories.
        seed: of their noise.
        batch: trajectories that run together.
        each_call: called with the number of calls that are done.

    Returns:
        rows with `min`, `q01`, `mean`, `q99`, `max`, `std`; `grid_min` and `grid_max`, the ends of the quantizer's grid at
        that step, and its `interval` (the scale; the rows' mean where the range is that of the row); `clipped`, the share
        of values beyond those ends.
    """
    parts, calls = batches(images, batch), sampling.calls(denoiser)
    generator = torch.Generator().manual_seed(seed)
    choices = {choice: (switch, i) for switch in model.switches() for i, choice in enumerate(switch.choices)}
    stats: dict[str, ActivationStats] = {}
    max_values = MAX_VALUES

    def record(name: str, quantizer: AffineQuantizer, inputs: tuple[Tensor, ...]) -> None:
        """Forward pre-hook of a quantizer; of several bit-widths only the one that this step uses counts."""
        switch, choice = choices.get(quantizer, (None, 0))
        if switch is None or int(switch.at[model.context.index[0]]) == choice:
            x = inputs[0]
            own = stats.setdefault(name, ActivationStats(quantizer.spec))
            own.add(x, quantizer.scale_provider(x), max_values, generator)

    rows: list[Row] = []
    with ExitStack() as stack:
        stack.enter_context(float_units(model, denoiser.network, quantized_units(model, denoiser.network, structure)))
        for name, quantizer in model.activation_quantizers().items():
            stack.enter_context(quantizer.register_forward_pre_hook(partial(record, activation_name(name))))
        predict = sampling.predictor(model.for_timesteps(calls))
        start: dict[str, Any] = {"seed": seed, "stream": Stream.DIAGNOSTICS}
        trajectories = [sampling.trajectory(predict, denoiser, **start, indices=part) for part in parts]
        for call, t in enumerate(calls):
            stats.clear()
            for part, steps in zip(parts, trajectories, strict=True):
                max_values = max(1, MAX_VALUES * len(part) // images)
                next(steps)
            for name, own in stats.items():
                rows.append({"activation": name, "bits": own.spec.bits, "call": call, "t": t, **own.columns()})
            each_call(call + 1)
    return rows


def activation_name(quantizer: str) -> str:
    """`block.conv1.input_quantizer.choices.0` -> `block.conv1.input`; choices of one activation share its name."""
    name = quantizer.replace(".processor.quantizers.", ".").replace("_quantizer", "")
    return name.partition(".choices.")[0].replace(".parts.", ".")


def range_changes(rows: list[Row]) -> list[Row]:
    """One row per activation: how much it changes along the trajectory, and how well its quantizer follows.

    Returns:
        rows, the most changing first, with `width_change`, the largest width q99 - q01 over the smallest; `correlation` of
        the standard deviation with the call's number (Pearson's; 0 where it does not change); `interval_change`, the largest
        scale over the smallest; `clipped`, the mean share, and `most_clipped` with `at_t`, where it is largest;
        `same_as`, an earlier activation with the same values on the same grids (all embedding projections read one
        tensor), or an empty text.
    """
    first: dict[tuple[Any, ...], str] = {}
    changes: list[Row] = []
    for name, group in grouped(rows, "activation").items():
        exact = ("bits", "min", "max", "mean", "std", "grid_min", "grid_max")  # quantiles are drawn
        same = first.setdefault(tuple(row[key] for row in group for key in exact), name)
        changes.append({"activation": name, **_change(group), "same_as": same if same != name else ""})
    return sorted(changes, key=lambda row: row["width_change"], reverse=True)


def _change(group: list[Row]) -> Row:
    keys = ("q01", "q99", "interval", "std", "clipped", "call")
    low, high, scale, std, clipped, call = torch.tensor([[row[k] for row in group] for k in keys], dtype=torch.float64)
    width = high - low
    correlation = torch.corrcoef(torch.stack([call, std]))[0, 1] if len(group) > 1 else torch.tensor(0.0)
    worst = int(clipped.argmax())
    return {
        "bits": group[0]["bits"],
        "width_change": float(width.max() / width.min().clamp(min=SMALLEST_SCALE)),
        "correlation": float(correlation.nan_to_num()),
        "interval_change": float(scale.max() / scale.min()),
        "clipped": float(clipped.mean()),
        "most_clipped": float(clipped[worst]),
        "at_t": group[worst]["t"],
    }

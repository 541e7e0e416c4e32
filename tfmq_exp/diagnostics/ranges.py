"""What activations look like at every network call of the float model, beside the ranges of their quantizers.

As figures 2 to 4 of TDQ (arXiv 2306.02316) ask: do activations change along the trajectory, and does the interval follow?
"""

from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from tfmq_exp.denoisers.denoiser import Denoiser
from tfmq_exp.denoisers.structure import UNetStructure
from tfmq_exp.diagnostics.activation_stats import ActivationStats
from tfmq_exp.diagnostics.partial_quantization import made_float
from tfmq_exp.diagnostics.trajectory_error import STREAM
from tfmq_exp.quant.functional import SMALLEST_SCALE
from tfmq_exp.quant.quantizers.affine import AffineQuantizer
from tfmq_exp.quant.quantizers.step_switch import StepSwitch
from tfmq_exp.sampling.guidance import Sampling
from tfmq_exp.surgery.quantized_unet import QuantizedUNet

DRAWN = 2**15  # values of an activation and call that quantiles are taken from: the rank of q99 is off by 0.06 %
Row = dict[str, Any]


def activation_ranges(
    model: QuantizedUNet,
    denoiser: Denoiser,
    structure: UNetStructure,
    sampling: Sampling,
    *,
    images: int,
    seed: int,
    batch: int,
    each_call: Callable[[int], None] = lambda _: None,
) -> list[Row]:
    """Every quantized activation at every network call of the float model: one pass of the network sees all of them.

    All trajectories advance together, batch after batch, so that the values of one call are all that is kept.

    Args:
        model: the finished model, whose quantizers are looked at; none of them acts.
        denoiser: the float network.
        structure: its parts.
        sampling: how it is sampled; under guidance both halves of a batch are seen.
        images: trajectories.
        seed: of their noise.
        batch: how many pass together.
        each_call: told how many calls are done.

    Returns:
        rows with `min`, `q01`, `mean`, `q99`, `max`, `std`; `grid_min` and `grid_max`, the ends of the quantizer's grid at
        that step, and its `interval` (the scale; the rows' mean where the range is that of the row); `clipped`, the share
        of values beyond those ends.
    """
    indices = [range(start, min(start + batch, images)) for start in range(0, images, batch)]
    rows: list[Row] = []
    with made_float(model, denoiser.unet, structure.sites, model.plan.operands), _watched(model, seed) as watched:
        predict = sampling.predictor(model.for_timesteps(sampling.calls(denoiser)))
        walks = [sampling.trajectory(predict, denoiser, seed=seed, stream=STREAM, indices=part) for part in indices]
        for call, t in enumerate(sampling.calls(denoiser)):
            for part, walk in zip(indices, walks, strict=True):
                watched.values = max(1, DRAWN * len(part) // images)
                next(walk)
            rows += [
                {"activation": name, "bits": tally.spec.bits, "call": call, "t": t, **tally.columns()}
                for name, tally in watched.tallies.items()
            ]
            watched.tallies = {}
            each_call(call + 1)
    return rows


class _Watch:
    """A tally for every activation of the present call, and how many values each keeps of a batch."""

    def __init__(self, model: QuantizedUNet, seed: int) -> None:
        self.tallies: dict[str, ActivationStats] = {}
        self.values = DRAWN
        self.generator = torch.Generator().manual_seed(seed)
        self.context = model.context
        self.choices: dict[nn.Module, tuple[StepSwitch, int]] = {
            choice: (switch, i) for switch in model.switches() for i, choice in enumerate(switch.choices)
        }

    def see(self, name: str, quantizer: AffineQuantizer, x: Tensor) -> None:
        """Before a quantizer runs; of several bit-widths only the one that this step uses counts."""
        switch, choice = self.choices.get(quantizer, (None, 0))
        if switch is not None and int(switch.at[self.context.index[0]]) != choice:
            return
        tally = self.tallies.setdefault(name, ActivationStats(quantizer.spec))
        tally.add(x, quantizer.source(x), self.values, self.generator)


@contextmanager
def _watched(model: QuantizedUNet, seed: int) -> Generator[_Watch]:
    watch = _Watch(model, seed)

    def hook(name: str) -> Callable[[nn.Module, Any], None]:
        return lambda quantizer, args: watch.see(name, quantizer, args[0])  # type: ignore[arg-type]

    handles = [
        quantizer.register_forward_pre_hook(hook(activation_name(name)))
        for name, quantizer in model.activation_quantizers().items()
    ]
    try:
        yield watch
    finally:
        for handle in handles:
            handle.remove()


def activation_name(quantizer: str) -> str:
    """`block.conv1.input_quantizer.choices.0` -> `block.conv1.input`; choices of one activation share its name."""
    name = quantizer.replace(".processor.quantizers.", ".").replace("_quantizer", "")
    return name.partition(".choices.")[0].replace(".parts.", ".")


def range_changes(rows: list[Row]) -> list[Row]:
    """One row per activation: how much it changes along the trajectory, and how well its quantizer follows.

    Returns:
        rows, the most changing first, with `width_change`, the largest width q99 - q01 over the smallest; `correlation` of
        the standard deviation with the call's number (Pearson's; 0 where it does not change); `interval_change`, the largest
        interval over the smallest; `clipped`, the mean share, and `most_clipped` with `at_t`, where it is largest;
        `same_as`, an earlier activation with the same values on the same grids (all embedding projections read one
        tensor), or an empty text.
    """
    by_name: dict[str, list[Row]] = {}
    for row in rows:
        by_name.setdefault(row["activation"], []).append(row)
    first: dict[tuple[Any, ...], str] = {}
    same = {name: first.setdefault(_signature(group), name) for name, group in by_name.items()}
    found = [
        {**_change(name, group), "same_as": same[name] if same[name] != name else ""} for name, group in by_name.items()
    ]
    return sorted(found, key=lambda row: row["width_change"], reverse=True)


def _signature(group: list[Row]) -> tuple[Any, ...]:
    """All but the quantiles, which are drawn."""
    keys = ("bits", "min", "max", "mean", "std", "grid_min", "grid_max")
    return tuple(row[key] for row in group for key in keys)


def _change(name: str, group: list[Row]) -> Row:
    width, interval, std, clipped, call = (
        torch.tensor(column, dtype=torch.float64)
        for column in (
            [row["q99"] - row["q01"] for row in group],
            *([row[key] for row in group] for key in ("interval", "std", "clipped", "call")),
        )
    )
    correlation = torch.corrcoef(torch.stack([call, std]))[0, 1] if len(group) > 1 else torch.tensor(0.0)
    worst = int(clipped.argmax())
    return {
        "activation": name,
        "bits": group[0]["bits"],
        "width_change": float(width.max() / width.min().clamp(min=SMALLEST_SCALE)),
        "correlation": float(correlation.nan_to_num()),
        "interval_change": float(interval.max() / interval.min()),
        "clipped": float(clipped.mean()),
        "most_clipped": float(clipped[worst]),
        "at_t": group[worst]["t"],
    }

"""Figures of a diagnosis: heat maps of layers over timesteps, ranges of single activations, bars of layers and units."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

Rows = Sequence[Mapping[str, Any]]

TALLEST = 80  # rows of a figure; what is beyond them is in the CSV
LINES = 6  # activations with a plot of their own
SMALLEST = 1e-12  # stands for 0 on a logarithmic axis
LEAST_CLIPPED = 0.01  # percent, where the colours of the clipped shares begin
SHORTER = {
    "down_blocks": "down",
    "up_blocks": "up",
    "mid_block": "mid",
    "attentions": "attn",
    "resnets": "res",
    "transformer_blocks": "block",
    "temporal_information_block": "temporal block",
}
TIME = "timestep t (sampling goes to the right)"


def feature_map(rows: Rows, path: Path, title: str) -> None:
    """Relative error of every temporal feature at every timestep, and its cosine distance."""
    figure, axes = _beside(_names(rows, "layer"))
    for axis, key, label in zip(
        axes, ("relative_mse", "cosine_distance"), ("squared error / float power", "cosine distance"), strict=True
    ):
        grid = np.maximum(_grid(rows, "layer", "step", key), SMALLEST)
        norm = LogNorm(grid.min(), max(grid.max(), 10 * grid.min()))
        _heat_map(axis, grid, _names(rows, "layer"), _times(rows, "step"), label, norm=norm, cmap="magma")
    _save(figure, path, title)


def range_map(rows: Rows, order: Sequence[str], path: Path, title: str) -> None:
    """Width of every activation at every call against its own mean, and the share of values beyond the grid.

    Args:
        rows: one for each activation and call.
        order: activations from the top down.
        path: of the picture.
        title: above it.
    """
    names = list(order[:TALLEST])
    kept = [row for row in rows if row["activation"] in set(names)]
    wide = [{**row, "width": row["q99"] - row["q01"]} for row in kept]
    width = np.maximum(_grid(wide, "activation", "call", "width", names), SMALLEST)
    change = np.log2(width / width.mean(axis=1, keepdims=True))
    clipped = np.maximum(100 * _grid(kept, "activation", "call", "clipped", names), LEAST_CLIPPED)
    most = max(0.1, float(np.abs(change).max()))
    share = LogNorm(LEAST_CLIPPED, max(1.0, float(clipped.max())))
    figure, (left, right) = _beside(names)
    times = _times(rows, "call")
    _heat_map(left, change, names, times, "log2 of width / mean width", vmin=-most, vmax=most, cmap="RdBu_r")
    _heat_map(right, clipped, names, times, "values beyond the grid, %", norm=share, cmap="magma")
    _save(figure, path, title)


def range_lines(rows: Rows, order: Sequence[str], path: Path, title: str) -> None:
    """Extremes, quantiles and mean of the first activations over the calls, with the ends of the quantizer's grid."""
    names = list(order[:LINES])
    columns = min(3, len(names))
    lines = -(-len(names) // columns)
    size = (4.2 * columns, 2.9 * lines + 0.5)
    figure, axes = plt.subplots(lines, columns, figsize=size, layout="constrained", squeeze=False)
    for axis, name in zip(axes.flat, names, strict=False):
        own = sorted((row for row in rows if row["activation"] == name), key=lambda row: row["call"])
        call = [row["call"] for row in own]

        def of(key: str, own: Rows = own) -> list[float]:
            return [row[key] for row in own]

        axis.fill_between(call, of("min"), of("max"), color="tab:blue", alpha=0.15, label="min to max")
        axis.fill_between(call, of("q01"), of("q99"), color="tab:blue", alpha=0.35, label="1 % to 99 %")
        axis.plot(call, of("mean"), color="tab:blue", label="mean")
        axis.plot(
            call, of("grid_min"), color="tab:red", linestyle="--", drawstyle="steps-mid", label="quantizer's grid"
        )
        axis.plot(call, of("grid_max"), color="tab:red", linestyle="--", drawstyle="steps-mid")
        axis.set_title(short_name(name), fontsize=8)
        axis.grid(alpha=0.3)
        _time_axis(axis, _times(rows, "call"))
    for axis in list(axes.flat)[len(names) :]:
        axis.axis("off")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=8)
    _save(figure, path, title)


def rounding_bars(rows: Rows, path: Path, title: str) -> None:
    """Per layer, the share of weights away from the nearest integer, and the weight's error under both roundings."""
    rows = rows[:TALLEST]
    names = [row["layer"] for row in rows]
    figure, (left, right) = _beside(names)
    at = np.arange(len(rows))
    left.barh(at, [row["changed"] for row in rows], color="tab:blue")
    left.set(xlabel="share of weights away from the nearest integer")
    left.xaxis.set_major_formatter(PercentFormatter(1.0))
    nearest = [row["nearest_relative_mse"] for row in rows]
    right.scatter(nearest, at, facecolors="none", edgecolors="black", s=30, label="nearest")
    right.scatter([row["relative_mse"] for row in rows], at, color="tab:red", s=14, label="this model")
    right.set(xlabel="squared error of the weight / its power", xscale="log")
    right.legend(fontsize=8)
    _layers_down(left, right, names)
    _save(figure, path, title)


def accumulation_lines(rows: Rows, path: Path, title: str) -> None:
    """Errors of single steps and what accumulates from them."""
    labels = {
        "eps_error": "noise, on the float path",
        "own_eps_error": "noise, on the quantized path",
        "eps_distance": "noise, between the paths",
        "x_error": "x, between the paths",
    }
    call = [row["step"] for row in rows]
    figure, axis = plt.subplots(figsize=(7, 4), layout="constrained")
    for (key, label), style in zip(labels.items(), ("-", "--", "-", "-"), strict=True):
        axis.plot(call, [row[key] for row in rows], style, marker="o", markersize=3, label=label)
    axis.set(ylabel="mean squared error / variance", yscale="log")
    axis.legend(fontsize=8)
    axis.grid(alpha=0.3)
    _time_axis(axis, _times(rows, "step"))
    _save(figure, path, title)


def sensitivity_bars(rows: Rows, thirds: Sequence[str], path: Path, title: str) -> None:
    """Error of the prediction, unit by unit in execution order, with a mark for each third of the sampling steps."""
    rows = rows[:TALLEST]
    names = [row["unit"] for row in rows]
    height = _height(names)
    figure, axis = plt.subplots(figsize=(8, height), layout="constrained")
    at = np.arange(len(rows))
    axis.barh(
        at, [max(row["relative_error"], SMALLEST) for row in rows], color="tab:blue", alpha=0.4, label="all steps"
    )
    for third, marker in zip(thirds, ("<", "o", ">"), strict=True):
        marked = [np.nan if row[third] is None else row[third] for row in rows]  # some have no samples
        axis.scatter(marked, at, marker=marker, s=14, label=third.replace("_", " "), zorder=3)
    shown = [row[key] for row in rows for key in ("relative_error", *thirds) if (row[key] or 0) > 0]
    axis.set(xlabel="squared error of the prediction / its power", xscale="log")
    if shown:
        axis.set_xlim(min(shown) / 2, max(shown) * 2)
    axis.legend(fontsize=8)
    _layers_down(axis, axis, names)
    _save(figure, path, title)


def _names(rows: Rows, key: str) -> list[str]:
    return list(dict.fromkeys(row[key] for row in rows))[:TALLEST]


def _times(rows: Rows, key: str) -> list[int]:
    """The timestep of every step or call."""
    found = {row[key]: row["t"] for row in rows}
    return [found[step] for step in sorted(found)]


def _grid(rows: Rows, down: str, across: str, value: str, names: Sequence[str] | None = None) -> np.ndarray:
    """Values as a matrix: names down, steps across."""
    names = names or _names(rows, down)
    row_of = {name: i for i, name in enumerate(names)}
    grid = np.full((len(names), 1 + max(row[across] for row in rows)), np.nan)
    for row in rows:
        if row[down] in row_of:
            grid[row_of[row[down]], row[across]] = row[value]
    return grid


def _heat_map(
    axis: Axes, grid: np.ndarray, names: Sequence[str], times: Sequence[int], label: str, **colours: Any
) -> None:
    image = axis.imshow(grid, aspect="auto", interpolation="nearest", **colours)
    assert isinstance(axis.figure, Figure)
    axis.figure.colorbar(image, ax=axis, label=label, shrink=min(1.0, 4 / _height(names)))
    axis.set_yticks(range(len(names)), [short_name(name) for name in names], fontsize=6)
    axis.label_outer()
    _time_axis(axis, times)


def _time_axis(axis: Axes, times: Sequence[int]) -> None:
    """Calls from left to right, named by their timesteps."""
    every = max(1, -(-len(times) // 8))
    axis.set_xticks(range(0, len(times), every), [str(t) for t in times[::every]], fontsize=7)
    axis.set_xlabel(TIME, fontsize=8)


def _layers_down(first: Axes, last: Axes, names: Sequence[str]) -> None:
    first.set_yticks(range(len(names)), [short_name(name) for name in names], fontsize=6)
    for axis in (first, last):
        axis.set_ylim(len(names) - 0.5, -0.5)
        axis.grid(axis="x", alpha=0.3)
        axis.set_axisbelow(True)
    if last is not first:
        last.set_yticks([])


def _beside(names: Sequence[str]) -> tuple[Figure, tuple[Axes, Axes]]:
    figure, axes = plt.subplots(1, 2, figsize=(12, _height(names)), layout="constrained")
    return figure, (axes[0], axes[1])


def _height(names: Sequence[str]) -> float:
    return max(3.0, 1.4 + 0.13 * len(names))


def short_name(name: str) -> str:
    """Names of deep layers, with shorter words for what is in most of them."""
    for word, shorter in SHORTER.items():
        name = name.replace(word, shorter)
    return name


def _save(figure: Figure, path: Path, title: str) -> None:
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=120)
    plt.close(figure)

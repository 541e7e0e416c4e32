"""Figures of a diagnosis: heat maps of layers over timesteps, ranges of single activations, bars of layers and units."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.ticker import PercentFormatter

from tfmq_exp.report.comparability import group_by
from tfmq_exp.report.figures.canvas import TIME, save_figure, set_time_axes, short_name

Rows = Sequence[Mapping[str, Any]]

MAX_ROWS = 80  # of a figure; the CSV has all
PLOTTED_ACTIVATIONS = 6
SMALLEST = 1e-12  # drawn for 0 on a logarithmic axis
LEAST_CLIPPED = 0.01  # percent, where the colours of the clipped shares begin


def feature_map(rows: Rows, path: Path, title: str) -> None:
    """Draw relative error and cosine distance of every temporal feature at every timestep."""
    names = list(dict.fromkeys(row["layer"] for row in rows))[:MAX_ROWS]
    panels: list[tuple[str, np.ndarray, dict[str, Any]]] = []
    for label, column in (("squared error / float power", "relative_mse"), ("cosine distance", "cosine_distance")):
        grid = np.maximum(_grid(rows, "layer", "step", column, names), SMALLEST)
        panels.append((label, grid, {"norm": LogNorm(grid.min(), max(grid.max(), 10 * grid.min())), "cmap": "magma"}))
    _heat_maps(panels, names, {row["step"]: row["t"] for row in rows}, path, title)


def range_map(rows: Rows, order: Sequence[str], path: Path, title: str) -> None:
    """Draw every activation's width at every call against its own mean, and the share of values beyond the grid.

    Args:
        rows: one for each activation and call.
        order: activations from the top down.
        path: of the picture.
        title: above it.
    """
    names = list(order[:MAX_ROWS])
    low, high, clipped = (_grid(rows, "activation", "call", column, names) for column in ("q01", "q99", "clipped"))
    width = np.maximum(high - low, SMALLEST)
    change = np.log2(width / width.mean(axis=1, keepdims=True))
    most = max(0.1, float(np.abs(change).max()))
    percent = np.maximum(100 * clipped, LEAST_CLIPPED)
    norm = LogNorm(LEAST_CLIPPED, max(1.0, float(percent.max())))
    panels = (
        ("log2 of width / mean width", change, {"vmin": -most, "vmax": most, "cmap": "RdBu_r"}),
        ("values beyond the grid, %", percent, {"norm": norm, "cmap": "magma"}),
    )
    _heat_maps(panels, names, {row["call"]: row["t"] for row in rows}, path, title)


def range_lines(rows: Rows, order: Sequence[str], path: Path, title: str) -> None:
    """Draw extremes, quantiles and mean of the first activations over the timesteps, with the ends of the grid.

    Args:
        rows: of `activation_ranges`.
        order: names of activations; the first `PLOTTED_ACTIVATIONS` are drawn.
        path: of the picture.
        title: above it.
    """
    names = list(order[:PLOTTED_ACTIVATIONS])
    columns = min(3, len(names))
    lines = -(-len(names) // columns)
    size = (4.2 * columns, 2.9 * lines + 0.5)
    figure, axes = plt.subplots(lines, columns, figsize=size, layout="constrained", squeeze=False)
    activations = group_by(sorted(rows, key=lambda row: row["call"]), lambda row: row["activation"])
    grid = {"color": "tab:red", "linestyle": "--", "drawstyle": "steps-mid"}
    for axis, name in zip(axes.flat, names, strict=False):
        of = {column: [row[column] for row in activations[name]] for column in activations[name][0]}
        axis.fill_between(of["t"], of["min"], of["max"], color="tab:blue", alpha=0.15, label="min to max")
        axis.fill_between(of["t"], of["q01"], of["q99"], color="tab:blue", alpha=0.35, label="1 % to 99 %")
        axis.plot(of["t"], of["mean"], color="tab:blue", label="mean")
        axis.plot(of["t"], of["grid_min"], **grid, label="quantizer's grid")
        axis.plot(of["t"], of["grid_max"], **grid)
        axis.set_title(short_name(name), fontsize=8)
        set_time_axes([axis])
    for axis in list(axes.flat)[len(names) :]:
        axis.axis("off")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=8)
    save_figure(figure, path, title)


def rounding_bars(rows: Rows, path: Path, title: str) -> None:
    """Draw per layer the share of weights away from the nearest integer, and the weight's error under both roundings."""
    rows = rows[:MAX_ROWS]
    at = np.arange(len(rows))
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, _height(len(rows))), layout="constrained")
    left.barh(at, [row["changed"] for row in rows], color="tab:blue")
    left.set(xlabel="share of weights away from the nearest integer")
    left.xaxis.set_major_formatter(PercentFormatter(1.0))
    nearest = [row["nearest_relative_mse"] for row in rows]
    right.scatter(nearest, at, facecolors="none", edgecolors="black", s=30, label="nearest")
    right.scatter([row["relative_mse"] for row in rows], at, color="tab:red", s=14, label="this model")
    right.set(xlabel="squared error of the weight / its power", xscale="log")
    right.legend(fontsize=8)
    _list_layers((left, right), [row["layer"] for row in rows])
    save_figure(figure, path, title)


def sensitivity_bars(rows: Rows, thirds: Sequence[str], path: Path, title: str) -> None:
    """Draw the prediction's error unit by unit in execution order, with a mark for each third of the sampling steps.

    Args:
        rows: one for each unit, with `relative_error` and a column for each third; the first `MAX_ROWS` are drawn.
        thirds: names of these columns, from the first steps to the last.
        path: of the picture.
        title: above it.
    """
    rows = rows[:MAX_ROWS]
    at = np.arange(len(rows))
    figure, axis = plt.subplots(figsize=(8, _height(len(rows))), layout="constrained")
    errors = [max(row["relative_error"], SMALLEST) for row in rows]
    axis.barh(at, errors, color="tab:blue", alpha=0.4, label="all steps")
    for third, marker in zip(thirds, ("<", "o", ">"), strict=True):
        marked = [np.nan if row[third] is None else row[third] for row in rows]  # some have no samples
        axis.scatter(marked, at, marker=marker, s=14, label=third.replace("_", " "), zorder=3)
    shown = [row[key] for row in rows for key in ("relative_error", *thirds) if (row[key] or 0) > 0]
    axis.set(xlabel="squared error of the prediction / its power", xscale="log")
    if shown:
        axis.set_xlim(min(shown) / 2, max(shown) * 2)
    axis.legend(fontsize=8)
    _list_layers((axis,), [row["unit"] for row in rows])
    save_figure(figure, path, title)


def _grid(rows: Rows, down: str, across: str, value: str, names: Sequence[str]) -> np.ndarray:
    """Values as a matrix: names down, steps across."""
    index = {name: i for i, name in enumerate(names)}
    grid = np.full((len(names), 1 + max(row[across] for row in rows)), np.nan)
    for row in rows:
        if row[down] in index:
            grid[index[row[down]], row[across]] = row[value]
    return grid


def _heat_maps(
    panels: Sequence[tuple[str, np.ndarray, Mapping[str, Any]]],
    names: Sequence[str],
    timesteps: Mapping[int, int],
    path: Path,
    title: str,
) -> None:
    """Draw matrices beside each other: label, values, colours; names down, timesteps of steps or calls across."""
    height = _height(len(names))
    figure, axes = plt.subplots(1, len(panels), figsize=(6 * len(panels), height), layout="constrained")
    every = range(0, len(timesteps), max(1, -(-len(timesteps) // 8)))
    for axis, (label, grid, colours) in zip(axes, panels, strict=True):
        image = axis.imshow(grid, aspect="auto", interpolation="nearest", **colours)
        figure.colorbar(image, ax=axis, label=label, shrink=min(1.0, 4 / height))
        axis.set_yticks(range(len(names)), map(short_name, names), fontsize=6)
        axis.label_outer()
        axis.set_xticks(every, [str(timesteps[step]) for step in every], fontsize=7)
        axis.set_xlabel(TIME, fontsize=8)
    save_figure(figure, path, title)


def _list_layers(axes: Sequence[Axes], names: Sequence[str]) -> None:
    """Let layers run from the top down, named at the first axis."""
    for axis in axes:
        axis.set_yticks([])
        axis.set_ylim(len(names) - 0.5, -0.5)
        axis.grid(axis="x", alpha=0.3)
        axis.set_axisbelow(True)
    axes[0].set_yticks(range(len(names)), list(map(short_name, names)), fontsize=6)


def _height(rows: int) -> float:
    return max(3.0, 1.4 + 0.13 * rows)

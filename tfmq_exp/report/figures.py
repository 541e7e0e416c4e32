"""Figures of runs, drawn by matplotlib without a display: errors over timesteps, samples, and what a diagnosis finds."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from tfmq_exp.report.comparability import group_by

matplotlib.use("Agg")

Rows = Sequence[Mapping[str, Any]]
TIME = "timestep t (sampling goes to the right)"
SHORT_WORDS = {
    **{"down_blocks": "down", "up_blocks": "up", "mid_block": "mid", "attentions": "attn", "resnets": "res"},
    **{"transformer_blocks": "block", "temporal_information_block": "temporal block"},
}
MAX_ROWS = 80  # of a figure; the CSV has all
PLOTTED_ACTIVATIONS = 6
SMALLEST = 1e-12  # drawn for 0 on a logarithmic axis
VARIANCE = "mean squared error / variance"
TRAJECTORY = {"eps_error": "noise prediction, on the float path", "x_error": "distance of the trajectories"}
ACCUMULATION = {
    **{"eps_error": "noise, on the float path", "own_eps_error": "noise, on the quantized path"},
    **{"eps_distance": "noise, between the paths", "x_error": "x, between the paths"},
}
# panels of the figures of errors: figure, label and scale of the y axis, labels of the drawn columns
ERRORS: Sequence[tuple[str, str, str, Mapping[str, str]]] = (
    ("temporal", "cosine similarity to float", "linear", {"cosine": ""}),
    ("temporal", "squared error / float power", "log", {"relative_mse": ""}),
    ("trajectory", VARIANCE, "log", TRAJECTORY),
    ("accumulation", VARIANCE, "log", ACCUMULATION),
)


def short_name(name: str) -> str:
    """The name of a layer with the most frequent words shortened."""
    for word, short in SHORT_WORDS.items():
        name = name.replace(word, short)
    return name


@contextmanager
def saved_figure(
    path: Path, title: str, size: tuple[float, float], grid: tuple[int, int] = (1, 1), description: str = ""
) -> Iterator[tuple[Figure, list[Axes]]]:
    """A figure and its axes (lines and columns of them) to draw on; it is written and closed afterwards.

    Args:
        path: of the PNG file.
        title: above the axes.
        size: width and height in inches.
        grid: lines and columns of axes.
        description: sentences that the file holds beside the picture; reports show them below it.
    """
    figure, axes = plt.subplots(*grid, figsize=size, layout="constrained", squeeze=False)
    yield figure, list(axes.flat)
    if title:
        figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=120, metadata={"Description": description} if description else None)
    plt.close(figure)


def _set_time_axes(axes: Iterable[Axes]) -> None:
    """Let timesteps run from the noisiest on the left to the image on the right."""
    for axis in axes:
        axis.set_xlabel(TIME, fontsize=8)
        axis.invert_xaxis()
        axis.grid(alpha=0.3)


def error_curves(kind: str, rows: Rows, path: Path, title: str) -> None:
    """Draw a figure of `ERRORS` over the timesteps: of temporal features, the trajectory, or what accumulates."""
    panels = [panel for panel in ERRORS if panel[0] == kind]
    with saved_figure(path, title, (1 + 5 * len(panels), 3.8), (1, len(panels))) as (_, axes):
        for axis, (_, label, scale, columns) in zip(axes, panels, strict=True):
            for (column, name), dash in zip(columns.items(), ("-", "--", "-.", ":"), strict=False):  # they may overlap
                values = [row[column] for row in rows]
                axis.plot([row["t"] for row in rows], values, dash, marker="o", markersize=3, label=name)
            axis.set(ylabel=label, yscale=scale)
            if len(columns) > 1:
                axis.legend(fontsize=8)
        _set_time_axes(axes)


def side_by_side(images: tuple[np.ndarray, np.ndarray], path: Path, titles: tuple[str, str]) -> None:
    """Draw two sets of images (uint8 [n, channels, height, width]) as grids; image i of both has the same seed."""
    with saved_figure(path, "", (9, 4.8), (1, 2)) as (_, axes):
        for axis, pixels, title in zip(axes, images, titles, strict=True):
            axis.imshow(mosaic(pixels, 8, gap=1), cmap="gray", vmin=0, vmax=255, interpolation="nearest")
            axis.set_title(title, fontsize=10)
            axis.axis("off")


def mosaic(images: np.ndarray, columns: int, gap: int = 0) -> np.ndarray:
    """Images as one picture, [height, width] or [height, width, 3], row by row, with a grey `gap` to the right and below."""
    images = np.pad(images, ((0, 0), (0, 0), (0, gap), (0, gap)), constant_values=96)
    count, channels, height, width = images.shape
    rows = -(-count // columns)
    canvas = np.zeros((rows * columns, channels, height, width), dtype=np.uint8)
    canvas[:count] = images
    grid = canvas.reshape(rows, columns, channels, height, width).transpose(0, 3, 1, 4, 2)
    grid = grid.reshape(rows * height, columns * width, channels)
    return grid[..., 0] if channels == 1 else grid


def range_lines(rows: Rows, order: Sequence[str], path: Path, title: str) -> None:
    """Draw extremes, quantiles and mean of the first activations of `order` over the timesteps, with the ends of the grid."""
    names = list(order[:PLOTTED_ACTIVATIONS])
    columns = min(3, len(names))
    lines = -(-len(names) // columns)
    activations = group_by(sorted(rows, key=lambda row: row["call"]), lambda row: row["activation"])
    grid: dict[str, Any] = {"color": "tab:red", "linestyle": "--", "drawstyle": "steps-mid"}
    with saved_figure(path, title, (4.2 * columns, 2.9 * lines + 0.5), (lines, columns)) as (figure, axes):
        for axis, name in zip(axes, names, strict=False):
            of = {column: [row[column] for row in activations[name]] for column in activations[name][0]}
            axis.fill_between(of["t"], of["min"], of["max"], color="tab:blue", alpha=0.15, label="min to max")
            axis.fill_between(of["t"], of["q01"], of["q99"], color="tab:blue", alpha=0.35, label="1 % to 99 %")
            axis.plot(of["t"], of["mean"], color="tab:blue", label="mean")
            axis.plot(of["t"], of["grid_min"], **grid, label="quantizer's grid")
            axis.plot(of["t"], of["grid_max"], **grid)
            axis.set_title(short_name(name), fontsize=8)
        _set_time_axes(axes[: len(names)])
        for axis in axes[len(names) :]:
            axis.axis("off")
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=8)


def rounding_bars(rows: Rows, path: Path, title: str) -> None:
    """Draw per layer the share of weights away from the nearest integer, and the weight's error under both roundings."""
    with _layer_axes(rows, "layer", path, title, (12, 2)) as (rows, at, (left, right)):
        left.barh(at, [row["changed"] for row in rows], color="tab:blue")
        left.set(xlabel="share of weights away from the nearest integer")
        left.xaxis.set_major_formatter(PercentFormatter(1.0))
        nearest = [row["nearest_relative_mse"] for row in rows]
        right.scatter(nearest, at, facecolors="none", edgecolors="black", s=30, label="nearest")
        right.scatter([row["relative_mse"] for row in rows], at, color="tab:red", s=14, label="this model")
        right.set(xlabel="squared error of the weight / its power", xscale="log")
        right.legend(fontsize=8)


def sensitivity_bars(rows: Rows, thirds: Sequence[str], path: Path, title: str) -> None:
    """Draw the prediction's error unit by unit in execution order, with a mark for each third of the sampling steps."""
    with _layer_axes(rows, "unit", path, title, (8, 1)) as (rows, at, (axis,)):
        errors = [max(row["relative_error"], SMALLEST) for row in rows]
        axis.barh(at, errors, color="tab:blue", alpha=0.4, label="all steps")
        for third, marker in zip(thirds, ("<", "o", ">"), strict=True):
            marked = [np.nan if row[third] is None else row[third] for row in rows]  # some have no samples
            axis.scatter(marked, at, marker=marker, s=14, label=third.replace("_", " "), zorder=3)
        axis.set(xlabel="squared error of the prediction / its power", xscale="log")
        if shown := [row[key] for row in rows for key in ("relative_error", *thirds) if (row[key] or 0) > 0]:
            axis.set_xlim(min(shown) / 2, max(shown) * 2)
        axis.legend(fontsize=8)


@contextmanager
def _layer_axes(
    rows: Rows, key: str, path: Path, title: str, size: tuple[int, int]
) -> Iterator[tuple[Rows, np.ndarray, list[Axes]]]:
    """The drawn rows, their places, and axes (width and number) with layers from the top down, named at the first."""
    rows = rows[:MAX_ROWS]
    with saved_figure(path, title, (size[0], height_of(len(rows))), (1, size[1])) as (_, axes):
        yield rows, np.arange(len(rows)), axes
        for axis in axes:
            axis.set_yticks([])
            axis.set_ylim(len(rows) - 0.5, -0.5)
            axis.grid(axis="x", alpha=0.3)
            axis.set_axisbelow(True)
        axes[0].set_yticks(range(len(rows)), [short_name(row[key]) for row in rows], fontsize=6)


def height_of(rows: int) -> float:
    """Height in inches of axes with so many named lines."""
    return max(3.0, 1.4 + 0.13 * rows)

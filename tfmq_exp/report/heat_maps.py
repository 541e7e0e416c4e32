"""Heat maps of what diagnoses find: names down, sampling steps across."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.colors import LogNorm

from tfmq_exp.report.figures import MAX_ROWS, SMALLEST, TIME, Rows, height_of, saved_figure, short_name

LEAST_CLIPPED = 0.01  # percent, where the colours of the clipped shares begin


def feature_map(rows: Rows, path: Path, title: str) -> None:
    """Draw relative error and cosine distance of every temporal feature at every timestep."""
    names = list(dict.fromkeys(row["layer"] for row in rows))[:MAX_ROWS]
    panels: dict[str, tuple[np.ndarray, dict[str, Any]]] = {}
    for label, column in (("squared error / float power", "relative_mse"), ("cosine distance", "cosine_distance")):
        grid = np.maximum(matrix_of(rows, "layer", "step", column, names), SMALLEST)
        panels[label] = grid, {"norm": LogNorm(grid.min(), max(grid.max(), 10 * grid.min())), "cmap": "magma"}
    heat_maps(panels, names, {row["step"]: row["t"] for row in rows}, path, title)


def range_map(rows: Rows, order: Sequence[str], path: Path, title: str) -> None:
    """Draw activations, in `order` from the top: width at every call against the mean, share beyond the grid."""
    names = list(order[:MAX_ROWS])
    low, high, clipped = (matrix_of(rows, "activation", "call", column, names) for column in ("q01", "q99", "clipped"))
    width = np.maximum(high - low, SMALLEST)
    change = np.log2(width / width.mean(axis=1, keepdims=True))
    most = max(0.1, float(np.abs(change).max()))
    percent = np.maximum(100 * clipped, LEAST_CLIPPED)
    norm = LogNorm(LEAST_CLIPPED, max(1.0, float(percent.max())))
    panels = {
        "log2 of width / mean width": (change, {"vmin": -most, "vmax": most, "cmap": "RdBu_r"}),
        "values beyond the grid, %": (percent, {"norm": norm, "cmap": "magma"}),
    }
    heat_maps(panels, names, {row["call"]: row["t"] for row in rows}, path, title)


def matrix_of(rows: Rows, down: str, across: str, value: str, names: Sequence[str]) -> np.ndarray:
    """Values as a matrix: names down, steps across.

    Args:
        rows: of a table.
        down: column with the names.
        across: column with the steps.
        value: column with the values.
        names: of the lines, in order.
    """
    found = {(row[down], row[across]): row[value] for row in rows}
    steps = range(1 + max(row[across] for row in rows))
    return np.array([[found.get((name, step), np.nan) for step in steps] for name in names], dtype=float)


def heat_maps(
    panels: Mapping[str, tuple[np.ndarray, Mapping[str, Any]]],
    names: Sequence[str],
    timesteps: Mapping[int, float],
    path: Path,
    title: str,
    description: str = "",
) -> None:
    """Draw matrices with their colours beside each other; names down, timesteps of steps or calls across.

    Args:
        panels: by the label of the colours: a matrix, and what gives it colours.
        names: of the lines.
        timesteps: by step or call.
        path: of the figure.
        title: of the figure.
        description: see `saved_figure`.
    """
    height = height_of(len(names))
    every = range(0, len(timesteps), max(1, -(-len(timesteps) // 8)))
    with saved_figure(path, title, (6 * len(panels), height), (1, len(panels)), description) as (figure, axes):
        for axis, (label, (grid, colours)) in zip(axes, panels.items(), strict=True):
            image = axis.imshow(grid, aspect="auto", interpolation="nearest", **colours)
            figure.colorbar(image, ax=axis, label=label, shrink=min(1.0, 4 / height))
            axis.set_yticks(range(len(names)), map(short_name, names), fontsize=6)
            axis.label_outer()
            axis.set_xticks(every, [f"{timesteps[step]:.4g}" for step in every], fontsize=7)
            axis.set_xlabel(TIME, fontsize=8)

"""Figures of one run: errors over the timesteps, and float beside quantized samples."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

from tfmq_exp.report.figures.canvas import save_figure, set_time_axes

Rows = Sequence[Mapping[str, float]]
Panel = tuple[str, str, Mapping[str, str]]  # label and scale of the y axis, labels of the drawn columns
VARIANCE = "mean squared error / variance"
DASHES = ("-", "--", "-.", ":")


def temporal_error(rows: Rows, path: Path, title: str) -> None:
    """Draw cosine similarity and squared error of the temporal features."""
    similarity: Panel = ("cosine similarity to float", "linear", {"cosine": ""})
    _draw(rows, path, title, similarity, ("squared error / float power", "log", {"relative_mse": ""}))


def trajectory_error(rows: Rows, path: Path, title: str) -> None:
    """Draw the error of the predicted noise at each step, and the distance that the trajectories have accumulated."""
    labels = {"eps_error": "noise prediction, on the float path", "x_error": "distance of the trajectories"}
    _draw(rows, path, title, (VARIANCE, "log", labels))


def accumulation_lines(rows: Rows, path: Path, title: str) -> None:
    """Draw errors of single steps, and what accumulates from them."""
    labels = {
        "eps_error": "noise, on the float path",
        "own_eps_error": "noise, on the quantized path",
        "eps_distance": "noise, between the paths",
        "x_error": "x, between the paths",
    }
    _draw(rows, path, title, (VARIANCE, "log", labels))


def _draw(rows: Rows, path: Path, title: str, *panels: Panel) -> None:
    size = (1 + 5 * len(panels), 3.8)
    figure, axes = plt.subplots(1, len(panels), figsize=size, layout="constrained", squeeze=False)
    for axis, (label, scale, columns) in zip(axes[0], panels, strict=True):
        for (column, name), dash in zip(columns.items(), DASHES, strict=False):  # curves may cover each other
            values = [row[column] for row in rows]
            axis.plot([row["t"] for row in rows], values, dash, marker="o", markersize=3, label=name)
        axis.set(ylabel=label, yscale=scale)
        if len(columns) > 1:
            axis.legend(fontsize=8)
    set_time_axes(axes[0])
    save_figure(figure, path, title)


def side_by_side(left: np.ndarray, right: np.ndarray, path: Path, titles: tuple[str, str], columns: int = 8) -> None:
    """Draw two sets of images as two grids; image i of both has the same seed.

    Args:
        left: uint8 [n, channels, height, width], 1 or 3 channels.
        right: likewise.
        path: of the picture.
        titles: of the two grids.
        columns: images in a row of a grid.
    """
    figure, axes = plt.subplots(1, 2, figsize=(9, 4.8), layout="constrained")
    for axis, images, title in zip(axes, (left, right), titles, strict=True):
        axis.imshow(mosaic(images, columns, gap=1), cmap="gray", vmin=0, vmax=255, interpolation="nearest")
        axis.set_title(title, fontsize=10)
        axis.axis("off")
    save_figure(figure, path)


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

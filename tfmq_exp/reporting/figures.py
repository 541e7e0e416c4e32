"""Figures of one run: errors per timestep, and float beside quantized samples."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

Rows = Sequence[Mapping[str, float]]


def temporal_error(rows: Rows, path: Path, title: str) -> None:
    """Cosine similarity and mean squared error of the temporal features over the timesteps."""
    t = [row["t"] for row in rows]
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    left.plot(t, [row["cosine"] for row in rows], marker="o", markersize=3)
    left.set(ylabel="cosine similarity to float")
    right.plot(t, [row["relative_mse"] for row in rows], marker="o", markersize=3, color="tab:red")
    right.set(ylabel="squared error / float power", yscale="log")
    _finish(figure, (left, right), title, path)


def trajectory_error(rows: Rows, path: Path, title: str) -> None:
    """Error of the predicted noise at each step, and the distance that the trajectories have accumulated."""
    t = [row["t"] for row in rows]
    figure, axis = plt.subplots(figsize=(6, 3.6), layout="constrained")
    axis.plot(
        t, [row["eps_error"] for row in rows], marker="o", markersize=3, label="noise prediction, on the float path"
    )
    axis.plot(t, [row["x_error"] for row in rows], marker="o", markersize=3, label="distance of the trajectories")
    axis.set(ylabel="mean squared error / variance", yscale="log")
    axis.legend()
    _finish(figure, (axis,), title, path)


def _finish(figure: Figure, axes: Sequence[Axes], title: str, path: Path) -> None:
    """Sampling runs from the noisiest timestep on the left to the image on the right."""
    for axis in axes:
        axis.set(xlabel="timestep t (sampling goes to the right)")
        axis.invert_xaxis()
        axis.grid(alpha=0.3)
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def side_by_side(left: np.ndarray, right: np.ndarray, path: Path, titles: tuple[str, str], columns: int = 8) -> None:
    """Two sets of images, uint8 [n, channels, height, width], as two grids; image i of both has the same seed."""
    figure, axes = plt.subplots(1, 2, figsize=(9, 4.8), layout="constrained")
    for axis, images, title in zip(axes, (left, right), titles, strict=True):
        axis.imshow(mosaic(images, columns, gap=1), cmap="gray", vmin=0, vmax=255, interpolation="nearest")
        axis.set_title(title, fontsize=10)
        axis.axis("off")
    figure.savefig(path, dpi=120)
    plt.close(figure)


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

"""Common parts of figures: the axis of sampling time, short names of layers, and saving."""

from collections.abc import Iterable
from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

TIME = "timestep t (sampling goes to the right)"
SHORT_WORDS = {
    "down_blocks": "down",
    "up_blocks": "up",
    "mid_block": "mid",
    "attentions": "attn",
    "resnets": "res",
    "transformer_blocks": "block",
    "temporal_information_block": "temporal block",
}


def short_name(name: str) -> str:
    """The name of a layer with the most frequent words shortened."""
    for word, short in SHORT_WORDS.items():
        name = name.replace(word, short)
    return name


def set_time_axes(axes: Iterable[Axes]) -> None:
    """Let timesteps run from the noisiest on the left to the image on the right."""
    for axis in axes:
        axis.set_xlabel(TIME, fontsize=8)
        axis.invert_xaxis()
        axis.grid(alpha=0.3)


def save_figure(figure: Figure, path: Path, title: str = "") -> None:
    """Write the picture and close the figure."""
    if title:
        figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=120)
    plt.close(figure)

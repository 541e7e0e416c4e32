"""Figures of what quantization changes inside a network: similarity of blocks, and attention to words, with a sentence each."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.colors import LogNorm

from tfmq_exp.report.comparability import group_by
from tfmq_exp.report.figures import MAX_ROWS, Rows, saved_figure, short_name
from tfmq_exp.report.heat_maps import heat_maps, matrix_of

MEASURES = {"cka": "linear CKA", "cosine": "cosine similarity"}
NAMED_BLOCKS = 3
SMALLEST = 1e-6  # drawn for distances of 0, or below it by noise; float32 has no finer ones
MAX_WORDS = 6  # of a figure; the CSV has all


def similarity_sentence(rows: Rows, measure: str) -> str:
    """The blocks with the lowest similarity in the mean over the steps, and the step with the lowest in the mean over blocks."""
    known = [row for row in rows if row[measure] is not None]
    if not known:
        return f"No block's features vary from image to image: there is no {MEASURES[measure]}."
    means = {key: _means(known, key, measure) for key in ("block", "step")}
    worst = sorted(means["block"], key=means["block"].__getitem__)[:NAMED_BLOCKS]
    named: list[str] = []
    for block in worst:
        lowest = min((row for row in known if row["block"] == block), key=lambda row: row[measure])
        named.append(
            f"{short_name(block)} ({means['block'][block]:.4g}, lowest {lowest[measure]:.4g} at t={_t(lowest)})"
        )
    step = min(means["step"], key=means["step"].__getitem__)
    t = next(row for row in known if row["step"] == step)
    return (
        f"By {MEASURES[measure]} with the float network, in the mean over the steps, these blocks are least similar: "
        f"{', '.join(named)}. All blocks together have {np.mean([*means['block'].values()]):.4g}, and least at "
        f"t={_t(t)} ({means['step'][step]:.4g})."
    )


def similarity_map(rows: Rows, measure: str, path: Path, title: str) -> None:
    """Draw the distance 1 - similarity, `cka` or `cosine`, of every block (down) at every step (across)."""
    names = list(dict.fromkeys(row["block"] for row in rows))[:MAX_ROWS]
    known = [{**row, measure: np.nan if row[measure] is None else row[measure]} for row in rows]
    grid = np.maximum(1 - matrix_of(known, "block", "step", measure, names), SMALLEST)  # NaN stays NaN
    drawn = grid[np.isfinite(grid)] if np.isfinite(grid).any() else np.array([SMALLEST])
    low, high = float(drawn.min()), float(drawn.max())
    colours = {"norm": LogNorm(low, max(high, 10 * low)), "cmap": "magma"}
    timesteps = {row["step"]: row["t"] for row in rows}
    panels = {f"1 - {MEASURES[measure]}": (grid, colours)}
    heat_maps(panels, names, timesteps, path, title, similarity_sentence(rows, measure))


def attention_sentence(rows: Rows, captions: Mapping[str, str]) -> str:
    """Subject of the maps, and the word, resolution and steps in which they differ most."""
    known = [row for row in rows if row["correlation"] is not None]
    found = (
        "Share of each position's cross-attention that a word gets, mean over heads, blocks of one resolution and steps of a third: "
        "above of the float network, below of the quantized one on the same inputs, in the same colours. "
    )
    if known:
        worst = min(known, key=lambda row: row["correlation"])
        found += (
            f"The maps differ most for “{worst['word']}” in the {worst['third'].replace('_', ' ')} of the steps at "
            f"{worst['height']} x {worst['width']} (correlation {worst['correlation']:.3g}). "
        )
    texts = group_by(captions, captions.__getitem__)
    return found + "; ".join(f"{', '.join(words)} of “{text:.120}”" for text, words in texts.items()) + "."


def attention_figure(
    maps: Mapping[str, Any], rows: Rows, captions: Mapping[str, str], thirds: Sequence[str], path: Path, title: str
) -> None:
    """Draw the maps of words, float above quantized, thirds of the sampling steps across.

    Args:
        maps: by word, arrays [networks, thirds, height, width] of one image; NaN in a third without steps.
        rows: of their comparison over all images, see `AttentionMaps.rows`.
        captions: of the images, by word.
        thirds: names of the columns.
        path: of the figure.
        title: of the figure.
    """
    shown = {word: np.asarray(maps[word]) for word in list(maps)[:MAX_WORDS]}
    lines = 2 * len(shown)
    size = (6, 0.7 + 1.9 * lines)
    with saved_figure(path, title, size, (lines, len(thirds)), attention_sentence(rows, captions)) as (_, axes):
        for i, (word, both) in enumerate(shown.items()):
            most = float(np.nanmax(both))
            for j, (network, own) in enumerate(zip(("float", "quantized"), both, strict=True)):
                for k, third in enumerate(thirds):
                    axis = axes[(2 * i + j) * len(thirds) + k]
                    axis.imshow(own[k], vmin=0, vmax=most, cmap="magma", interpolation="nearest")
                    axis.set_xticks([])
                    axis.set_yticks([])
                    if k == 0:
                        axis.set_ylabel(f"{word[:20]}, {network}", fontsize=8, parse_math=False)
                    if j == 0:
                        axis.set_title(f"{third.replace('_', ' ')}, to {most:.2g}", fontsize=8)


def _means(rows: Rows, key: str, measure: str) -> dict[Any, float]:
    return {
        name: float(np.mean([row[measure] for row in own])) for name, own in group_by(rows, lambda r: r[key]).items()
    }


def _t(row: Mapping[str, Any]) -> str:
    return f"{row['t']:.4g}"

"""Figures of similarity and attention: what their sentences say, cells without a value, and their place in the page."""

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from tests.helpers.run_folders import read, run
from tfmq_exp.report.similarity_figures import attention_figure, similarity_map, similarity_sentence

THIRDS = ("first_third", "second_third", "last_third")


def rows() -> list[dict[str, Any]]:
    """Three blocks in two steps; one has no value in the first."""
    values = {"mid_block.resnets.0": (0.5, 0.9), "conv_in": (1.0, 1.0), "conv_out": (None, 0.8)}
    return [
        {"block": block, "step": step, "t": t, "cka": own[step], "cosine": own[step]}
        for step, t in enumerate((501, 1))
        for block, own in values.items()
    ]


def test_the_sentence_names_worst_blocks_and_step() -> None:
    sentence = similarity_sentence(rows(), "cka")
    assert "mid.res.0 (0.7, lowest 0.5 at t=501), conv_out (0.8, lowest 0.8 at t=1), conv_in (1, " in sentence
    assert "All blocks together have 0.8333, and least at t=501 (0.75)." in sentence
    empty = [{**row, "cosine": None} for row in rows()]
    assert similarity_sentence(empty, "cosine").startswith("No block's features vary")


def test_cells_without_a_value_are_empty(tmp_path: Path) -> None:
    colours: list[set[tuple[int, ...]]] = []
    for name, blank in (("some", False), ("none", True)):
        path = tmp_path / f"{name}.png"
        similarity_map([{**row, "cka": None} if blank else row for row in rows()], "cka", path, "title")
        pixels = np.asarray(Image.open(path).convert("RGB"))
        height, width, _ = pixels.shape
        middle = pixels[height // 4 : 3 * height // 4, width // 3 : 2 * width // 3]
        colours.append(set(map(tuple, middle.reshape(-1, 3).tolist())))
    assert len(colours[0]) > 3
    assert colours[1] == {(255, 255, 255)}


def test_captions_are_text_in_figure_and_page(tmp_path: Path) -> None:
    """A caption is no formula of matplotlib, and no markup of the page."""
    folder = run(tmp_path / "one", "tfmq", 0)
    (folder / "diagnosis").mkdir()
    maps = {r"$\frac{": np.random.default_rng(0).random((2, 3, 4, 4))}
    maps[r"$\frac{"][:, 1] = np.nan  # a third without steps
    compared = [{"word": r"$\frac{", "third": "last_third", "height": 4, "width": 4, "correlation": 0.25}]
    captions = {r"$\frac{": "<b>a 猫</b>"}
    attention_figure(maps, compared, captions, THIRDS, folder / "diagnosis/attention_maps.png", "title")
    page = read(tmp_path)
    assert "in the last third of the steps at 4 x 4 (correlation 0.25)" in page.text
    assert r"$\frac{ of “<b>a 猫</b>”." in page.text
    assert "b" not in {tag for tag, _ in page.elements}

"""Colours, dashes and symbols of the page's charts."""

import hashlib
import itertools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

NEUTRAL = "#8a8a8a"  # the float network, and what belongs to no method
# Okabe and Ito's colours without yellow, which is too light for lines on white, and black
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
DASHES = ("solid", "dash", "dot")
SYMBOLS = ("circle", "square", "diamond", "triangle-up", "cross", "x", "triangle-down", "star", "pentagon", "hexagram")
# methods with a fixed style, those that are compared most first: neighbours differ in colour
METHODS = (
    *("tfmq", "brecq", "qdiff", "ptqd", "tdq", "nearest", "qdrop", "ptq4dm", "dynamic", "tfmq_cache"),
    *("tdq_thin", "freeze", "tfmq_qdrop", "intervals"),
)
# Tol's muted colours: stages of a run are no methods, and must not look like them
STAGE_COLOURS = (
    *("#332288", "#88CCEE", "#44AA99", "#117733", "#999933", "#DDCC77", "#CC6677", "#882255", "#AA4499"),
    *("#661100", "#6699CC"),
)


@dataclass(frozen=True)
class Style:
    """Colour, dash and symbol; labels that share a colour differ in the other two."""

    colour: str
    dash: str
    symbol: str

    def line(self, width: float) -> dict[str, Any]:
        return {"color": self.colour, "dash": self.dash, "width": width}

    def marker(self, size: int) -> dict[str, Any]:
        return {"color": self.colour, "symbol": self.symbol, "size": size}

    def area(self, opacity: float) -> str:
        """The colour, transparent."""
        red, green, blue = (int(self.colour[i : i + 2], 16) for i in (1, 3, 5))
        return f"rgba({red},{green},{blue},{opacity:g})"


def styles(labels: Iterable[str]) -> Mapping[str, Style]:
    """A style for each label, the same in every chart.

    Methods of `METHODS` have the same style in all pages. So have other labels, by their hash, unless another label of
    this page has that style already: then the next free one.
    """
    fixed = {name: _style(i, i // len(COLOURS), i) for i, name in enumerate(METHODS)}
    turns = itertools.product(range(len(SYMBOLS)), range(len(DASHES)), range(len(COLOURS)))
    every = [_style(colour, dash, symbol) for symbol, dash, colour in turns]
    names = sorted(set(labels))
    found = {label: fixed[label] for label in names if label in fixed}
    taken = set(fixed.values())
    for label in names:
        if label not in fixed:
            start = int.from_bytes(hashlib.sha256(label.encode()).digest()[:4], "big") % len(every)
            turned = every[start:] + every[:start]
            found[label] = next((style for style in turned if style not in taken), turned[0])
            taken.add(found[label])
    return found


def _style(colour: int, dash: int, symbol: int) -> Style:
    return Style(COLOURS[colour % len(COLOURS)], DASHES[dash % len(DASHES)], SYMBOLS[symbol % len(SYMBOLS)])

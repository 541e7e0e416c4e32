"""How a way of quantizing looks in every chart of a page."""

import hashlib
import itertools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

# Okabe and Ito's colours without yellow, which is too light for lines on white, and black
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
DASHES = ("solid", "dash", "dot")
SYMBOLS = ("circle", "square", "diamond", "triangle-up", "cross", "x", "triangle-down", "star", "pentagon", "hexagram")
# methods whose look is fixed, those that are compared most first: neighbours differ in colour
METHODS = (
    "tfmq",
    "brecq",
    "qdiff",
    "ptqd",
    "tdq",
    "nearest",
    "qdrop",
    "ptq4dm",
    "dynamic",
    "tfmq_cache",
    "tdq_thin",
    "freeze",
    "tfmq_qdrop",
    "intervals",
)
# Tol's muted colours: stages of a run are no methods, and must not look like them
STAGE_COLOURS = (
    *("#332288", "#88CCEE", "#44AA99", "#117733", "#999933", "#DDCC77", "#CC6677", "#882255", "#AA4499"),
    *("#661100", "#6699CC"),
)


@dataclass(frozen=True)
class Look:
    """Colour, dash and symbol; names that share a colour differ in the other two."""

    colour: str
    dash: str
    symbol: str

    def fill(self, opacity: float) -> str:
        """The colour as a transparent area."""
        red, green, blue = (int(self.colour[i : i + 2], 16) for i in (1, 3, 5))
        return f"rgba({red},{green},{blue},{opacity:g})"


def looks(labels: Iterable[str]) -> Mapping[str, Look]:
    """One look for each label, the same wherever it is drawn.

    Methods of `METHODS` look alike in all pages. So do other labels, which take the look that their hash chooses, or the
    next free one where another label of this page has it.
    """
    fixed = {name: _look(i, i // len(COLOURS), i) for i, name in enumerate(METHODS)}
    turns = itertools.product(range(len(SYMBOLS)), range(len(DASHES)), range(len(COLOURS)))
    every = [_look(colour, dash, symbol) for symbol, dash, colour in turns]
    named = sorted(set(labels))
    found = {label: fixed[label] for label in named if label in fixed}
    taken = set(fixed.values())
    for label in (label for label in named if label not in fixed):
        start = int.from_bytes(hashlib.sha256(label.encode()).digest()[:4], "big")
        turned = (every[(start + i) % len(every)] for i in range(len(every)))
        found[label] = next((look for look in turned if look not in taken), every[start % len(every)])
        taken.add(found[label])
    return found


def _look(colour: int, dash: int, symbol: int) -> Look:
    return Look(COLOURS[colour % len(COLOURS)], DASHES[dash % len(DASHES)], SYMBOLS[symbol % len(SYMBOLS)])

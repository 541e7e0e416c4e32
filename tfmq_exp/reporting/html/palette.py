"""How a way of quantizing looks in every chart of a page."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

# Okabe and Ito's colours without yellow, which is too light for lines on white, and black
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
DASHES = ("solid", "dash", "dot")
SYMBOLS = ("circle", "square", "diamond", "triangle-up", "cross", "x", "triangle-down", "star", "pentagon", "hexagram")
# Tol's muted colours: stages of a run are no methods, and must not look like them
STAGE_COLOURS = ("#332288", "#88CCEE", "#44AA99", "#117733", "#999933", "#DDCC77", "#CC6677", "#882255", "#AA4499")


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
    """One look for each label, the same wherever it is drawn; in the alphabet's order."""
    return {
        label: Look(
            COLOURS[i % len(COLOURS)],
            DASHES[i // len(COLOURS) % len(DASHES)],
            SYMBOLS[i % len(SYMBOLS)],
        )
        for i, label in enumerate(sorted(set(labels)))
    }

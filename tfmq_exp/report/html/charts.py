"""Parts of the charts of the page, each a choice of plotly figures: axes, and a fixed style for every method."""

import hashlib
import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import plotly.graph_objects as go

Views = dict[str, go.Figure]  # by the name that chooses one; the first is shown
TIME = "timestep t (sampling goes to the right)"
LOG_RATIO = 3  # of the greatest to the least score, from which on a linear axis would show the worst alone
FINE_LOG_RATIO = 200  # of the greatest to the least number, below which powers of ten are too few labels
MANY_CURVES = 8  # from which on a chart needs the width of the page
LIMITS = {"units": 60, "losses": 24, "bars": 60}  # in one chart
MAX_POINTS = 200  # of a curve; more cannot be distinguished
LEGEND = {"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom", "xanchor": "left", "traceorder": "normal"}
AXIS = {"zeroline": False, "automargin": True, "showline": True, "ticks": "outside", "ticklen": 4}
CATEGORIES = {"type": "category", "autorange": "reversed", "dtick": 1, "tickfont": {"size": 11}}  # from the top down
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


class Style(NamedTuple):
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
    places = [(i % len(COLOURS), i // len(COLOURS) % len(DASHES), i % len(SYMBOLS)) for i in range(len(METHODS))]
    fixed = {name: Style(COLOURS[c], DASHES[d], SYMBOLS[s]) for name, (c, d, s) in zip(METHODS, places, strict=True)}
    every = [Style(colour, dash, symbol) for symbol, dash, colour in itertools.product(SYMBOLS, DASHES, COLOURS)]
    names, taken = sorted(set(labels)), set(fixed.values())
    found = {label: fixed[label] for label in names if label in fixed}
    for label in (name for name in names if name not in fixed):
        start = int.from_bytes(hashlib.sha256(label.encode()).digest()[:4], "big") % len(every)
        turned = every[start:] + every[:start]
        found[label] = next((style for style in turned if style not in taken), turned[0])
        taken.add(found[label])
    return found


def figure(traces: Sequence[Any], x: Mapping[str, Any], y: Mapping[str, Any], **layout: Any) -> go.Figure:
    """Traces on two axes (of `axis`), with the legend above the plot, and with these settings of plotly's layout."""
    axes = {"xaxis": {**AXIS, **x}, "yaxis": {**AXIS, **y}, "hovermode": "closest"}
    frame = {"template": "none", "height": 380, "margin": {"l": 56, "r": 12, "t": 8, "b": 48}, "legend": LEGEND}
    return go.Figure(data=list(traces), layout={**frame, **axes, **layout})


def axis(title: str, **more: Any) -> dict[str, Any]:
    """An axis with a title near it."""
    return {"title": {"text": title, "standoff": 8}, **more}


def log_axis(title: str, values: Iterable[float]) -> dict[str, Any]:
    """A logarithmic axis for these values: labels at powers of ten, and between them where there are few powers."""
    positive = [value for value in values if value > 0]
    fine = bool(positive) and max(positive) < FINE_LOG_RATIO * min(positive)
    return axis(title, type="log", dtick="D2" if fine else 1, tickformat="~g", minexponent=5)


def score_axis(title: str, values: Sequence[float]) -> dict[str, Any]:
    """An axis for scores, logarithmic where they are far apart."""
    return log_axis(title, values) if values and 0 < LOG_RATIO * min(values) < max(values) else axis(title)


def thinned(count: int) -> list[int]:
    """Indices of a curve's points that are drawn: evenly spread, the first and the last among them."""
    if count <= MAX_POINTS:
        return list(range(count))
    return sorted({round(i * (count - 1) / (MAX_POINTS - 1)) for i in range(MAX_POINTS)})

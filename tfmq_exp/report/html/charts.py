"""A chart of the page: views to choose from, each a plotly figure without the page's colours, which the page sets."""

from collections.abc import Iterable, Mapping, Sequence, Sized
from dataclasses import dataclass
from typing import Any

import plotly.graph_objects as go

TIME = "timestep t (sampling goes to the right)"
LOG_RATIO = 3  # of the greatest to the least score, from which on a linear axis would show the worst alone
FINE_LOG_RATIO = 200  # of the greatest to the least number, below which powers of ten are too few labels
MANY_CURVES = 8  # from which on a chart needs the width of the page
MAX_POINTS = 200  # of a curve; more cannot be distinguished
LEGEND = {"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom", "xanchor": "left", "traceorder": "normal"}
AXIS = {"zeroline": False, "automargin": True, "showline": True, "ticks": "outside", "ticklen": 4}


@dataclass(frozen=True)
class Chart:
    """Views of one thing.

    Args:
        title: what is shown.
        note: for the reader.
        views: figures by the name that chooses them; the first is shown. A chart without any is not shown.
        wide: whether it takes the whole width of the page.
    """

    title: str
    note: str
    views: Sequence[tuple[str, go.Figure]]
    wide: bool = False

    def to_json(self) -> dict[str, Any]:
        """Plain data for the page's program."""
        return {"views": [{"name": name, "figure": figure.to_plotly_json()} for name, figure in self.views]}


def figure(
    traces: Sequence[Any], x: Mapping[str, Any], y: Mapping[str, Any], *, height: int = 380, **layout: Any
) -> go.Figure:
    """Traces on two axes, with the legend above the plot.

    Args:
        traces: plotly's.
        x: settings of the horizontal axis, as from `axis`.
        y: those of the vertical one.
        height: in pixels.
        layout: further settings of plotly's layout.
    """
    axes = {"xaxis": {**AXIS, **x}, "yaxis": {**AXIS, **y}}
    frame = {"template": "none", "height": height, "margin": {"l": 56, "r": 12, "t": 8, "b": 48}, "legend": LEGEND}
    return go.Figure(data=list(traces), layout={**frame, "hovermode": "closest", **axes, **layout})


def axis(title: str, **more: Any) -> dict[str, Any]:
    """An axis with a title near it."""
    return {"title": {"text": title, "standoff": 8}, **more}


def log_axis(title: str, values: Iterable[float]) -> dict[str, Any]:
    """A logarithmic axis for these values: labels at powers of ten, and between them where there are few powers."""
    positive = [value for value in values if value > 0]
    fine = bool(positive) and max(positive) < FINE_LOG_RATIO * min(positive)
    return axis(title, type="log", dtick="D2" if fine else 1, tickformat="~g", minexponent=5)


def score_axis(title: str, values: Iterable[float]) -> dict[str, Any]:
    """An axis for scores, logarithmic where they are far apart."""
    found = list(values)
    return log_axis(title, found) if found and 0 < LOG_RATIO * min(found) < max(found) else axis(title)


def category_axis() -> dict[str, Any]:
    """An axis of names from the top down."""
    return {"type": "category", "autorange": "reversed", "dtick": 1, "tickfont": {"size": 11}}


def is_wide(curves: Sized) -> bool:
    """Whether so many curves need the width of the page."""
    return len(curves) > MANY_CURVES


def thinned(count: int) -> list[int]:
    """Indices of a curve's points that are drawn: evenly spread, the first and the last among them."""
    if count <= MAX_POINTS:
        return list(range(count))
    return sorted({round(i * (count - 1) / (MAX_POINTS - 1)) for i in range(MAX_POINTS)})

"""A chart of the page: views to choose from, each a plotly figure without the page's colours, which the page sets."""

from collections.abc import Iterable, Mapping, Sequence, Sized
from dataclasses import dataclass
from typing import Any

import plotly.graph_objects as go

NEUTRAL = "#8a8a8a"  # the float network, and what belongs to no method
FAR = 3  # between the least and the greatest score: more than that, and a linear axis shows the worst alone
NEAR = 200  # between a chart's least and greatest number: less than that, and powers of ten are too few labels
MANY = 8  # curves in one chart, which then needs the width of the page
POINTS = 200  # of a curve; more cannot be told apart


@dataclass(frozen=True)
class Chart:
    """Views of one thing.

    Args:
        title: what is shown.
        note: what a reader must know of it.
        views: figures by the name that chooses them; the first is shown.
        wide: whether it takes the whole width of the page.
    """

    title: str
    note: str
    views: tuple[tuple[str, go.Figure], ...]
    wide: bool = False

    def to_json(self) -> dict[str, Any]:
        """Plain data for the page's program."""
        return {"views": [{"name": name, "figure": figure.to_plotly_json()} for name, figure in self.views]}


def figure(
    traces: Sequence[Any], x: Mapping[str, Any], y: Mapping[str, Any], *, height: int = 380, **layout: Any
) -> go.Figure:
    """Traces on two axes, with the legend above the plot."""
    plain = {"zeroline": False, "automargin": True, "showline": True, "ticks": "outside", "ticklen": 4}
    return go.Figure(
        data=list(traces),
        layout={
            "template": "none",
            "height": height,
            "margin": {"l": 56, "r": 12, "t": 8, "b": 48},
            "legend": {
                "orientation": "h",
                "x": 0,
                "y": 1.02,
                "yanchor": "bottom",
                "xanchor": "left",
                "traceorder": "normal",
            },
            "hovermode": "closest",
            "xaxis": {**plain, **x},
            "yaxis": {**plain, **y},
            **layout,
        },
    )


def axis(title: str, **more: Any) -> dict[str, Any]:
    """An axis with a title near it."""
    return {"title": {"text": title, "standoff": 8}, **more}


def log_axis(title: str, values: Iterable[float]) -> dict[str, Any]:
    """A logarithmic axis for these values: labels at powers of ten, and between them where there are few powers."""
    positive = [value for value in values if value > 0]
    near = bool(positive) and max(positive) < NEAR * min(positive)
    return axis(title, type="log", dtick="D2" if near else 1, tickformat="~g", minexponent=5)


def score_axis(title: str, values: Iterable[float]) -> dict[str, Any]:
    """An axis for scores, logarithmic where they are far apart."""
    found = list(values)
    return log_axis(title, found) if found and 0 < FAR * min(found) < max(found) else axis(title)


def many(drawn: Sized) -> bool:
    """Whether so many curves need the width of the page."""
    return len(drawn) > MANY


def kept(count: int) -> list[int]:
    """Indices of a curve's points that are drawn: evenly spread, the first and the last among them."""
    if count <= POINTS:
        return list(range(count))
    return sorted({round(i * (count - 1) / (POINTS - 1)) for i in range(POINTS)})

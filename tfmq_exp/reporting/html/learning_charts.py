"""What learning did: errors of the units before and after it, and losses on the way."""

import statistics
from collections.abc import Iterator, Mapping, Sequence

import plotly.graph_objects as go
from plotly.colors import sample_colorscale

from tfmq_exp.report.html.chart import NEUTRAL, Chart, axis, figure, kept, log_axis
from tfmq_exp.report.html.palette import Look
from tfmq_exp.report.html.runs import Row
from tfmq_exp.report.html.ways import Group, Way

UNITS = 60  # drawn in one chart
CURVES = 24  # losses drawn in one chart
LEGEND = 8  # names above a chart of losses


def unit_errors(group: Group, looks: Mapping[str, Look]) -> Chart | None:
    """Every unit's error before and after learning, mean over seeds."""
    views = tuple(
        (f"{way.bits} {way.label}", _units(found, looks[way.label])) for way, found in _with(group, "units.csv")
    )
    note = (
        "Error of a unit's outputs relative to their variance, before (open) and after learning (filled); mean over seeds. "
        f"Units in the network's order from the top, {UNITS} at most."
    )
    return Chart("Reconstruction error per unit", note, views, wide=True) if views else None


def _with(group: Group, file: str) -> Iterator[tuple[Way, list[Sequence[Row]]]]:
    """Ways with the rows of every seed that has some."""
    for way in group.quantized:
        found: list[Sequence[Row]] = [rows for member in way.members if (rows := member.run.tables.get(file))]
        if found:
            yield way, found


def _units(found: Sequence[Sequence[Row]], look: Look) -> go.Figure:
    before: dict[str, list[float]] = {}
    after: dict[str, list[float]] = {}
    for rows in found:
        for row in rows:
            before.setdefault(row["unit"], []).append(row["error_before"])
            after.setdefault(row["unit"], []).append(row["error_after"])
    names = list(before)[:UNITS]
    first, last = ([statistics.mean(side[name]) for name in names] for side in (before, after))
    joined: list[float | None] = [value for a, b in zip(first, last, strict=True) for value in (a, b, None)]
    traces = [
        go.Scatter(
            x=joined,
            y=[name for name in names for _ in range(3)],
            mode="lines",
            line={"color": NEUTRAL, "width": 1},
            showlegend=False,
            hoverinfo="skip",
        ),
        go.Scatter(
            name="before",
            x=first,
            y=names,
            mode="markers",
            marker={"symbol": "circle-open", "color": look.colour, "size": 9},
        ),
        go.Scatter(
            name="after", x=last, y=names, mode="markers", marker={"symbol": "circle", "color": look.colour, "size": 9}
        ),
    ]
    y = {"type": "category", "autorange": "reversed", "tickfont": {"size": 11}, "dtick": 1}
    return figure(traces, log_axis("error / variance ↓", [*first, *last]), y, height=110 + 19 * len(names))


def losses(group: Group) -> Chart | None:
    """Loss curves of the units, of the first seed that has them: seeds have curves of their own."""
    views = tuple(
        (f"{way.bits} {way.label}, {phase}", drawn)
        for way, found in _with(group, "losses.csv")
        for phase, drawn in _losses(found[0])
    )
    note = (
        "One curve for each unit, early units dark and late ones light; the first seed that has them. "
        f"{CURVES} units at most, evenly spread."
    )
    return Chart("Loss while learning", note, views) if views else None


def _losses(rows: Sequence[Row]) -> Iterator[tuple[str, go.Figure]]:
    phases: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for row in rows:
        phases.setdefault(row["phase"], {}).setdefault(row["unit"], []).append((row["iteration"], row["loss"]))
    for phase, units in phases.items():
        names = list(units)
        chosen = names if len(names) <= CURVES else [names[i * len(names) // CURVES] for i in range(CURVES)]
        shades = sample_colorscale("Viridis", [0.85 * i / max(1, len(chosen) - 1) for i in range(len(chosen))])
        traces = []
        for name, shade in zip(chosen, shades, strict=True):
            points = sorted(units[name])
            drawn = [points[i] for i in kept(len(points))]
            traces.append(
                go.Scatter(
                    name=name,
                    x=[x for x, _ in drawn],
                    y=[y for _, y in drawn],
                    mode="lines" if len(drawn) > 1 else "markers",
                    line={"color": shade, "width": 1.4},
                    showlegend=len(chosen) <= LEGEND,
                )
            )
        yield (
            phase,
            figure(traces, axis("iteration"), log_axis("loss", [y for points in units.values() for _, y in points])),
        )

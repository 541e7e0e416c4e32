"""Scores against bits, and against size and arithmetic, with the ways that no other beats in both."""

import math
import statistics
from collections.abc import Callable, Mapping, Sequence

import plotly.graph_objects as go

from tfmq_exp.report.html.chart import NEUTRAL, Chart, axis, figure, log_axis, many, score_axis
from tfmq_exp.report.html.palette import Look
from tfmq_exp.report.html.scores import Column, score_columns
from tfmq_exp.report.html.ways import Group, Way
from tfmq_exp.report.records import ScoreRecord

FLOAT_BITS = 32
NEAREST = 0.05  # of an axis, between points of cost that both have their bits beside them
ASIDE = 0.3  # how far around its bits the methods are spread, where neighbouring bits are 1 apart
LEAST = 1e-12  # a score whose logarithm is taken; FID may be zero
Point = tuple[float, float]


def measured(group: Group) -> list[Column]:
    """Columns of scores that some way has."""
    judged = [column for column in score_columns(str(group.evaluator["name"])) if column.judge]
    return [c for c in judged if any(c.read(r) is not None for way in group.ways for r in way.records)]


def scores_by_bits(group: Group, looks: Mapping[str, Look]) -> Chart | None:
    """Every score against bits, one curve for each method; a dashed line for the float network."""
    if not group.quantized:
        return None
    views = tuple((c.title, _by_bits(group, looks, c)) for c in measured(group))
    note = (
        "Mean over seeds; bars are one standard deviation, and a point names its seeds' scores. The dashed line is the float "
        "network."
    )
    return Chart("Scores against bits", note, views, wide=many(looks)) if views else None


def _by_bits(group: Group, looks: Mapping[str, Look], column: Column) -> go.Figure:
    traces = []
    labels = list(dict.fromkeys(way.label for way in group.quantized))
    places = {bits: place for place, bits in enumerate(group.bits)}
    for turn, label in enumerate(labels):
        ways = {way.bits: values(way, column.read) for way in group.quantized if way.label == label}
        there = [bits for bits in group.bits if ways.get(bits)]
        seeds = [", ".join(f"{value:.4g}" for value in ways[bits]) for bits in there]
        aside = ASIDE * ((turn + 0.5) / len(labels) - 0.5)  # bars of deviation do not cover each other
        look = looks[label]
        traces.append(
            go.Scatter(
                name=label,
                x=[places[bits] + aside for bits in there],
                y=[statistics.mean(ways[bits]) for bits in there],
                text=[
                    f"{bits}: {statistics.mean(ways[bits]):.4g}<br>seeds {own}"
                    for bits, own in zip(there, seeds, strict=True)
                ],
                hovertemplate=f"{label}<br>%{{text}}<extra></extra>",
                error_y={"array": [_deviation(ways[bits]) for bits in there], "thickness": 1, "width": 3},
                mode="lines+markers",
                line={"color": look.colour, "dash": look.dash, "width": 1.8},
                marker={"color": look.colour, "symbol": look.symbol, "size": 8},
            )
        )
    floats = [value for way in group.ways if way.is_float for value in values(way, column.read)]
    if floats:
        traces.append(
            go.Scatter(
                name="float",
                x=[-ASIDE, len(group.bits) - 1 + ASIDE],
                y=[statistics.mean(floats)] * 2,
                mode="lines",
                line={"color": NEUTRAL, "dash": "dash", "width": 1.5},
            )
        )
    x = axis("bits", tickmode="array", tickvals=list(places.values()), ticktext=list(places), showgrid=False)
    drawn = [value for trace in traces for value in trace.y]
    return figure(traces, x, score_axis(f"{column.title} ({column.judge}) {column.better}", drawn))


def values(way: Way, read: Callable[[ScoreRecord], float | None]) -> list[float]:
    """What the seeds of a way say."""
    return [value for record in way.records if (value := read(record)) is not None]


def _deviation(found: Sequence[float]) -> float:
    return statistics.stdev(found) if len(found) > 1 else 0.0


def front(points: Sequence[Point]) -> list[Point]:
    """The points that no other beats, where less is better in both; from the smallest first number on."""
    best, found = float("inf"), []
    for first, second in sorted(set(points)):
        if second < best:
            best = second
            found.append((first, second))
    return found


def apart(points: Sequence[Point]) -> set[Point]:
    """Points with room for a label: the front first, then any that is not near one that has a label."""
    axes = [[math.log(max(value, LEAST)) for value in axis] for axis in zip(*points, strict=True)]
    rooms = [NEAREST * (max(axis) - min(axis)) for axis in axes]
    places = dict(zip(points, zip(*axes, strict=True), strict=True))
    found: set[Point] = set()
    for point in dict.fromkeys([*front(points), *points]):
        if not any(_near(places[point], places[other], rooms) for other in found):
            found.add(point)
    return found


def _near(first: Sequence[float], second: Sequence[float], rooms: Sequence[float]) -> bool:
    return all(abs(a - b) <= room for a, b, room in zip(first, second, rooms, strict=True))


def bit_operations(record: ScoreRecord) -> float | None:
    """Bit-operations relative to the float network's.

    A multiply-accumulate of integers counts the product of the two nominal widths, any other 32 x 32. Only those with both
    operands integer are such; a layer whose output alone is quantized multiplies real numbers.
    """
    if not record.quantized and record.method == "float":
        return 1.0
    share = record.quantized.get("mac_share_weights_and_inputs")
    widths = [int(part) for part in "".join(c if c.isdigit() else " " for c in record.quant).split()]
    if not isinstance(share, int | float) or len(widths) != 2 or max(widths) > FLOAT_BITS:  # a468: 4, 6 or 8
        return None
    return share * widths[0] * widths[1] / FLOAT_BITS**2 + 1 - share


def pareto(group: Group, looks: Mapping[str, Look]) -> Chart | None:
    """FID against size and against bit-operations."""
    column = next((c for c in measured(group) if c.title == "FID"), None)
    if column is None or len(group.ways) < 2:
        return None
    costs: tuple[tuple[str, str, Callable[[ScoreRecord], float | None]], ...] = (
        ("size", "file of the network, MB", lambda record: record.weights_bytes / 1e6),
        ("bit-operations", "bit-operations / float network's", bit_operations),
    )
    views = [(name, _pareto(group, looks, column, title, read)) for name, title, read in costs]
    shown = tuple((name, made) for name, made in views if made is not None)
    note = (
        "The line joins the ways that no other beats in both. Bit-operations are computed: the product of the nominal widths "
        "where both operands are integers, else 32 × 32."
    )
    return Chart("Quality against cost", note, shown, wide=many(looks)) if shown else None


def _pareto(
    group: Group,
    looks: Mapping[str, Look],
    column: Column,
    title: str,
    cost: Callable[[ScoreRecord], float | None],
) -> go.Figure | None:
    points: dict[str, list[tuple[float, float, str]]] = {}
    for way in group.ways:
        prices, found = values(way, cost), values(way, column.read)
        if prices and found:
            name = "float" if way.is_float else way.label
            points.setdefault(name, []).append((statistics.mean(prices), statistics.mean(found), way.bits))
    if not points:
        return None
    drawn = [(x, y) for some in points.values() for x, y, _ in some]
    line = front(drawn)
    named = apart(drawn)
    traces = [
        go.Scatter(
            name="front",
            x=[x for x, _ in line],
            y=[y for _, y in line],
            mode="lines",
            line={"color": NEUTRAL, "width": 1.5, "shape": "hv"},
            hoverinfo="skip",
        )
    ]
    for name, some in points.items():
        look = looks.get(name)
        traces.append(
            go.Scatter(
                name=name,
                x=[x for x, _, _ in some],
                y=[y for _, y, _ in some],
                customdata=[bits for _, _, bits in some],
                text=[bits if (x, y) in named else "" for x, y, bits in some],
                mode="markers+text",
                textposition="top center",
                textfont={"size": 10},
                cliponaxis=False,
                marker={
                    "color": look.colour if look else NEUTRAL,
                    "symbol": look.symbol if look else "circle-open",
                    "size": 10,
                },
                hovertemplate=f"%{{customdata}} {name}<br>%{{x:.4g}}, %{{y:.4g}}<extra></extra>",
            )
        )
    x, y = zip(*drawn, strict=True)
    return figure(traces, log_axis(f"{title} ↓", x), score_axis(f"{column.title} ({column.judge}) {column.better}", y))

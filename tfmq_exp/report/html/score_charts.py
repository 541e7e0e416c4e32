"""Scores against bits, and FID against size and arithmetic with the variants on the Pareto front."""

import math
import re
import statistics
from collections.abc import Mapping, Sequence

import plotly.graph_objects as go

from tfmq_exp.report.comparability import FLOAT, group_by
from tfmq_exp.report.html.charts import NEUTRAL, Style, Views, axis, figure, log_axis, score_axis
from tfmq_exp.report.html.grouping import Group
from tfmq_exp.report.html.score_table import measured_scores
from tfmq_exp.report.records import ScoreRecord
from tfmq_exp.report.tables import Column, Reader

FLOAT_BITS = 32
LABEL_ROOM = 0.05  # of an axis, between points of cost that both have their bits as a label
METHOD_SPREAD = 0.3  # width over which the methods of the same bits are spread, where neighbouring bits are 1 apart
LEAST_SCORE = 1e-12  # whose logarithm is taken; FID may be zero
Point = tuple[float, float]


def scores_by_bits(group: Group, styles: Mapping[str, Style]) -> Views:
    """Every score against bits, one curve for each method; a dashed line for the float network."""
    return {column.title: _by_bits(group, styles, column) for column in measured_scores(group) if group.quantized}


def _by_bits(group: Group, styles: Mapping[str, Style], column: Column) -> go.Figure:
    places = {bits: place for place, bits in enumerate(group.bits)}
    methods = group_by(group.quantized, lambda variant: variant.label)
    traces: list[go.Scatter] = []
    drawn: list[float] = []
    for turn, (label, variants) in enumerate(methods.items()):
        found = {variant.bits: values for variant in variants if (values := variant.values(column.read))}
        shift = METHOD_SPREAD * ((turn + 0.5) / len(methods) - 0.5)  # bars of deviation do not cover each other
        means = {bits: statistics.mean(values) for bits, values in found.items()}
        seeds = {bits: ", ".join(f"{value:.4g}" for value in values) for bits, values in found.items()}
        deviations = [statistics.stdev(values) if len(values) > 1 else 0.0 for values in found.values()]
        texts = [f"{bits}: {means[bits]:.4g}<br>seeds {seeds[bits]}" for bits in found]
        points = {"x": [places[bits] + shift for bits in found], "y": list(means.values()), "text": texts}
        bars = {"array": deviations, "thickness": 1, "width": 3}
        look = {"line": styles[label].line(1.8), "marker": styles[label].marker(8), "mode": "lines+markers"}
        template = f"{label}<br>%{{text}}<extra></extra>"
        traces.append(go.Scatter(name=label, error_y=bars, hovertemplate=template, **points, **look))
        drawn += means.values()
    if floats := [value for each in group.variants if each.is_float for value in each.values(column.read)]:
        line = {"color": NEUTRAL, "dash": "dash", "width": 1.5}
        ends = [-METHOD_SPREAD, len(places) - 1 + METHOD_SPREAD]
        drawn.append(statistics.mean(floats))
        traces.append(go.Scatter(name=FLOAT, x=ends, y=[drawn[-1]] * 2, mode="lines", line=line))
    x = axis("bits", tickmode="array", tickvals=list(places.values()), ticktext=list(places), showgrid=False)
    return figure(traces, x, score_axis(column.heading, drawn))


def pareto(group: Group, styles: Mapping[str, Style]) -> Views:
    """FID against size and against bit-operations, with the front of the variants that no other beats in both."""
    costs: dict[str, tuple[str, Reader]] = {
        "size": ("file of the network, MB", lambda record: record.weights_bytes / 1e6),
        "bit-operations": ("bit-operations / float network's", bit_operations),
    }
    views: Views = {}
    fid = next((column for column in measured_scores(group) if column.title == "FID"), None)
    if fid is None or len(group.variants) < 2:
        return views
    for name, (title, read) in costs.items():
        points: dict[str, list[tuple[Point, str]]] = {}
        for variant in group.variants:
            if (found := variant.values(read)) and (scores := variant.values(fid.read)):
                point = (statistics.mean(found), statistics.mean(scores))
                points.setdefault(FLOAT if variant.is_float else variant.label, []).append((point, variant.bits))
        if points:
            views[name] = _pareto(points, styles, f"{title} ↓", fid.heading)
    return views


def _pareto(
    points: Mapping[str, Sequence[tuple[Point, str]]], styles: Mapping[str, Style], cost: str, score: str
) -> go.Figure:
    every = [point for same in points.values() for point, _ in same]
    x, y = zip(*front(every), strict=True)
    line = {"color": NEUTRAL, "width": 1.5, "shape": "hv"}
    traces = [go.Scatter(name="front", x=x, y=y, mode="lines", line=line, hoverinfo="skip")]
    labelled = labelled_points(every)
    for name, same in points.items():
        texts = {
            "text": [bits if point in labelled else "" for point, bits in same],
            "customdata": [bits for _, bits in same],
            "hovertemplate": f"%{{customdata}} {name}<br>%{{x:.4g}}, %{{y:.4g}}<extra></extra>",
            **{"textposition": "top center", "textfont": {"size": 10}, "mode": "markers+text", "cliponaxis": False},
        }
        marker = styles.get(name, Style(NEUTRAL, "", "circle-open")).marker(10)
        x, y = zip(*(point for point, _ in same), strict=True)
        traces.append(go.Scatter(name=name, x=x, y=y, marker=marker, **texts))
    x, y = zip(*every, strict=True)
    return figure(traces, log_axis(cost, x), score_axis(score, y))


def front(points: Sequence[Point]) -> list[Point]:
    """The Pareto front, where less is better in both; from the smallest first number on."""
    found: list[Point] = []
    for first, second in sorted(set(points)):
        if not found or second < found[-1][1]:
            found.append((first, second))
    return found


def labelled_points(points: Sequence[Point]) -> set[Point]:
    """Points with room for a label: the front first, then any that is not near one that has a label."""
    logs = {point: [math.log(max(value, LEAST_SCORE)) for value in point] for point in points}
    rooms = [LABEL_ROOM * (max(values) - min(values)) for values in zip(*logs.values(), strict=True)]
    found: list[Point] = []
    for point in dict.fromkeys([*front(points), *points]):
        near = (all(abs(a - b) <= c for a, b, c in zip(logs[point], logs[o], rooms, strict=True)) for o in found)
        if not any(near):
            found.append(point)
    return set(found)


def bit_operations(record: ScoreRecord) -> float | None:
    """Bit-operations relative to the float network's.

    A multiply-accumulate of integers counts the product of the two nominal widths, any other 32 x 32. Only those with both
    operands integer are such; a layer whose output alone is quantized multiplies real numbers.
    """
    if not record.quantized and record.method == FLOAT:
        return 1.0
    share = record.quantized.get("mac_share_weights_and_inputs")
    widths = [int(digits) for digits in re.findall(r"\d+", record.quant)]
    if not isinstance(share, int | float) or len(widths) != 2 or max(widths) > FLOAT_BITS:  # a468: 4, 6 or 8
        return None
    return share * widths[0] * widths[1] / FLOAT_BITS**2 + 1 - share

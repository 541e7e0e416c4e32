"""Charts of the curves of runs: errors along the steps, errors of units, and losses; and times of stages with their table."""

import statistics
from collections.abc import Mapping, Sequence
from itertools import chain, cycle
from typing import Any, NamedTuple

import plotly.graph_objects as go
from plotly.colors import sample_colorscale

from tfmq_exp.report.comparability import group_by
from tfmq_exp.report.html import charts
from tfmq_exp.report.html.charts import LIMITS, NEUTRAL, Style, Views, axis, figure, log_axis, thinned
from tfmq_exp.report.html.grouping import Group, Variant
from tfmq_exp.report.html.run_reader import LOSSES, TEMPORAL, TRAJECTORY, UNITS
from tfmq_exp.report.records import is_number

FAR_APART = 10  # times the least seed's value: a band from there on covers the others' lines on a logarithmic axis
MARKED_POINTS = 50  # of a curve with markers, at most
MAX_LEGEND = 8  # names above a chart of losses
# Tol's muted colours: stages of a run are no methods, and must not look like them
STAGE_COLOURS = (
    *("#332288", "#88CCEE", "#44AA99", "#117733", "#999933", "#DDCC77", "#CC6677", "#882255", "#AA4499"),
    *("#661100", "#6699CC"),
)
VARIANCE = "mean squared error / variance ↓"
# file, column and y axis of the charts of errors over timesteps
ERRORS = {
    "temporal": (TEMPORAL, "relative_mse", "squared error / float power ↓"),
    "trajectory": (TRAJECTORY, "x_error", VARIANCE),
    "noise": (TRAJECTORY, "eps_error", VARIANCE),
}


class Series(NamedTuple):
    """A column over timesteps: the mean over seeds, and every seed."""

    timesteps: tuple[float, ...]
    mean: tuple[float, ...]
    seeds: tuple[tuple[float, ...], ...]


def series(variant: Variant, file: str, column: str) -> Series | None:
    """The series of a variant at the timesteps that all seeds have; None without any."""
    seeds = [{row["t"]: row[column] for row in rows} for rows in variant.tables(file)]
    shared = sorted(set[float].intersection(*map(set, seeds)), reverse=True) if seeds else []
    drawn = tuple(shared[i] for i in thinned(len(shared)))
    curves = tuple(tuple(seed[t] for t in drawn) for seed in seeds)
    return Series(drawn, tuple(map(statistics.mean, zip(*curves, strict=True))), curves) if drawn else None


def error_curves(group: Group, styles: Mapping[str, Style], chart: str) -> Views:
    """Errors of a chart of `ERRORS` over timesteps: for every variant the mean and span of its seeds."""
    file, column, y = ERRORS[chart]
    views: Views = {}
    for bits, variants in group.bits.items():
        found = {v.label: each for v in variants if (each := series(v, file, column))}
        spans: list[go.Scatter] = []
        lines: list[go.Scatter] = []
        for label, each in found.items():
            style = styles[label]
            spans += _span(label, each, style, pale=len(found) > charts.MANY_CURVES)
            mode = "lines+markers" if len(each.timesteps) <= MARKED_POINTS else "lines"
            curve = {"x": each.timesteps, "y": each.mean, "line": style.line(1.8), "marker": style.marker(6)}
            lines.append(go.Scatter(name=label, legendgroup=label, mode=mode, **curve))
        if found:  # no span covers a line
            values = [value for each in found.values() for seed in each.seeds for value in seed]
            x = axis(charts.TIME, autorange="reversed")
            views[bits] = figure([*spans, *lines], x, log_axis(y, values))
    return views


def _span(label: str, found: Series, style: Style, *, pale: bool) -> list[go.Scatter]:
    """A band of the seeds without zeros, which logarithmic axes cannot show, or thin lines where they are far apart."""
    least, most = (list(map(end, zip(*found.seeds, strict=True))) for end in (min, max))
    common = {"legendgroup": label, "showlegend": False, "mode": "lines", "hoverinfo": "skip"}
    if least == most:
        return []
    if any(high > FAR_APART * low for low, high in zip(least, most, strict=True)):
        thin = {"color": style.area(0.3 if pale else 0.5), "width": 1}
        return [go.Scatter(x=found.timesteps, y=seed, line=thin, **common) for seed in found.seeds]
    positive = [each for each in zip(found.timesteps, least, most, strict=True) if each[1] > 0]
    x = [t for t, _, _ in (*positive, *reversed(positive))]
    y = [high for _, _, high in positive] + [low for _, low, _ in reversed(positive)]
    colour = style.area(0.05 if pale else 0.15)
    return [go.Scatter(x=x, y=y, fill="toself", fillcolor=colour, line={"width": 0}, **common)]


def unit_errors(group: Group, styles: Mapping[str, Style]) -> Views:
    """Every unit's error before and after learning, mean over seeds; units in the network's order from the top."""
    views: Views = {}
    for variant in group.quantized:
        if not (units := group_by(chain(*variant.tables(UNITS)), lambda row: row["unit"])):
            continue
        names, columns = list(units)[: LIMITS["units"]], ("error_before", "error_after")
        before, after = ([statistics.mean(row[c] for row in units[name]) for name in names] for c in columns)
        joined = [value for pair in zip(before, after, strict=True) for value in (*pair, None)]
        line = {"color": NEUTRAL, "width": 1}
        repeated = [name for name in names for _ in range(3)]
        traces = [go.Scatter(x=joined, y=repeated, mode="lines", line=line, showlegend=False, hoverinfo="skip")]
        for name, errors, symbol in (("before", before, "circle-open"), ("after", after, "circle")):
            marker = {"symbol": symbol, "color": styles[variant.label].colour, "size": 9}
            traces.append(go.Scatter(name=name, x=errors, y=names, mode="markers", marker=marker))
        x = log_axis("error / variance ↓", [*before, *after])
        views[variant.name] = figure(traces, x, charts.CATEGORIES, height=110 + 19 * len(names))
    return views


def losses(group: Group) -> Views:
    """Loss curves of evenly spread units, of the first seed that has them: seeds have curves of their own."""
    views: Views = {}
    for variant in group.quantized:
        first = next(iter(variant.tables(LOSSES)), ())
        for phase, in_phase in group_by(first, lambda row: row["phase"]).items():
            units = group_by(in_phase, lambda row: row["unit"])
            count = min(len(units), LIMITS["losses"])
            names = [list(units)[i * len(units) // count] for i in range(count)]
            shades = sample_colorscale("Viridis", [0.85 * i / max(1, count - 1) for i in range(count)])
            traces: list[go.Scatter] = []
            for name, shade in zip(names, shades, strict=True):
                points = sorted((row["iteration"], row["loss"]) for row in units[name])
                x, y = zip(*(points[i] for i in thinned(len(points))), strict=True)
                mode, line = "lines" if len(x) > 1 else "markers", {"color": shade, "width": 1.4}
                traces.append(go.Scatter(name=name, x=x, y=y, mode=mode, line=line, showlegend=count <= MAX_LEGEND))
            y_axis = log_axis("loss", [row["loss"] for row in in_phase])
            views[f"{variant.name}, {phase}"] = figure(traces, axis("iteration"), y_axis)
    return views


def stage_rows(group: Group) -> list[dict[str, Any]]:
    """Every stage of every variant: how often it was computed and found, means of seconds, and the peak."""
    rows: list[dict[str, Any]] = []
    for variant in group.quantized:
        for stage in dict.fromkeys(stage for run in variant.runs for stage in run.stages):
            found = [run.stages[stage] for run in variant.runs if stage in run.stages]
            computed = sum(each.get("computed") is True for each in found)
            row = {"variant": variant, "stage": stage, "computed": computed, "found": len(found) - computed}
            for name in ("seconds", "took", "peak_mib"):
                numbers = [float(value) for each in found if is_number(value := each.get(name))]
                row |= {name: statistics.mean(numbers) if numbers else None, f"most {name}": max(numbers, default=0.0)}
            rows.append(row)
    return rows


def stage_times(rows: Sequence[Mapping[str, Any]]) -> Views:
    """Stacked bars of seconds, which stages take and which these runs spent; and the peak of memory."""
    variants = dict(list(group_by(rows, lambda row: row["variant"].name).items())[: LIMITS["bars"]])
    stages = dict.fromkeys(row["stage"] for found in variants.values() for row in found)

    def bars(unit: str, values: Mapping[str, list[float]], colours: Sequence[str], **layout: Any) -> go.Figure:
        common = {"y": list(variants), "orientation": "h", "showlegend": None if "barmode" in layout else False}
        named = zip(values.items(), cycle(colours), strict=False)
        traces = [go.Bar(name=name, x=x, marker={"color": colour}, **common) for (name, x), colour in named]
        height, x = 110 + 24 * len(variants), axis(unit, rangemode="tozero")
        return figure(traces, x, charts.CATEGORIES, height=height, bargap=0.3, **layout)

    def stacked(number: str) -> go.Figure:
        found = [{row["stage"]: row[number] or 0.0 for row in rows} for rows in variants.values()]
        means = {stage: [numbers.get(stage, 0.0) for numbers in found] for stage in stages}
        return bars("seconds", means, STAGE_COLOURS, barmode="stack")

    peaks = [max(row["most peak_mib"] for row in found) for found in variants.values()]
    spent = {"what stages take": stacked("took"), "what these runs spent": stacked("seconds")}
    return spent | {"peak memory": bars("MiB", {"peak": peaks}, [NEUTRAL])} if variants else {}

"""Charts of the curves of runs: errors along the sampling steps, errors of units before and after learning, and losses."""

import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain

import plotly.graph_objects as go
from plotly.colors import sample_colorscale

from tfmq_exp.report.comparability import group_by
from tfmq_exp.report.html.charts import (
    TIME,
    Chart,
    axis,
    category_axis,
    figure,
    is_wide,
    log_axis,
    thinned,
)
from tfmq_exp.report.html.grouping import Group, Variant
from tfmq_exp.report.html.run_reader import LOSSES, TEMPORAL, TRAJECTORY, UNITS, Rows
from tfmq_exp.report.html.theme import NEUTRAL, Style

FAR_APART = 10  # times the least seed's value: a band from there on covers the others' lines on a logarithmic axis
MARKED_POINTS = 50  # of a curve with markers, at most
MAX_UNITS = 60  # in one chart
MAX_LOSSES = 24  # in one chart
MAX_LEGEND = 8  # names above a chart of losses
SPAN = "the band spans the seeds, which are thin lines where they are far apart"
VARIANCE = "mean squared error / variance ↓"
# title, note, file, column and y axis of the charts of errors over timesteps
ERRORS = (
    (
        "Temporal-feature error per timestep",
        f"Squared error of the temporal features, relative to the float network's; {SPAN}.",
        *(TEMPORAL, "relative_mse", "squared error / float power ↓"),
    ),
    (
        "Trajectory error along the steps",
        f"Distance of the quantized trajectory to the float network's from the same seeds; {SPAN}.",
        *(TRAJECTORY, "x_error", VARIANCE),
    ),
    (
        "Error of the noise prediction",
        f"Error of one prediction at a time, on the float network's trajectory; {SPAN}.",
        *(TRAJECTORY, "eps_error", VARIANCE),
    ),
)


@dataclass(frozen=True)
class Series:
    """A column over timesteps: the mean over seeds, and every seed."""

    timesteps: tuple[float, ...]
    mean: tuple[float, ...]
    seeds: tuple[tuple[float, ...], ...]

    @property
    def least(self) -> tuple[float, ...]:
        """The least over seeds, at every timestep."""
        return tuple(map(min, zip(*self.seeds, strict=True)))

    @property
    def most(self) -> tuple[float, ...]:
        """The most over seeds, at every timestep."""
        return tuple(map(max, zip(*self.seeds, strict=True)))


def series(variant: Variant, file: str, column: str) -> Series | None:
    """The series of a variant at the timesteps that all seeds have; None without any."""
    seeds = [{row["t"]: row[column] for row in rows} for rows in variant.tables(file)]
    shared = sorted(set[float].intersection(*map(set, seeds)), reverse=True) if seeds else []
    drawn = tuple(shared[i] for i in thinned(len(shared)))
    if not drawn:
        return None
    curves = tuple(tuple(seed[t] for t in drawn) for seed in seeds)
    return Series(drawn, tuple(map(statistics.mean, zip(*curves, strict=True))), curves)


def error_charts(group: Group, styles: Mapping[str, Style]) -> list[Chart]:
    """Errors of temporal features, trajectory and noise prediction: for every variant the mean and span of its seeds."""
    charts: list[Chart] = []
    for title, note, file, column, y in ERRORS:
        views: list[tuple[str, go.Figure]] = []
        for bits in group.bits:
            every = {v.label: series(v, file, column) for v in group.quantized if v.bits == bits}
            if found := {label: each for label, each in every.items() if each is not None}:
                pale = is_wide(found)
                spans = [
                    trace for label, each in found.items() for trace in _span(label, each, styles[label], pale=pale)
                ]
                lines = [_mean(label, each, styles[label]) for label, each in found.items()]
                values = [value for each in found.values() for value in (*each.least, *each.most)]
                x = axis(TIME, autorange="reversed")
                views.append((bits, figure([*spans, *lines], x, log_axis(y, values))))  # no span covers a line
        charts.append(Chart(title, note, views, wide=is_wide(styles)))
    return charts


def _mean(label: str, found: Series, style: Style) -> go.Scatter:
    mode = "lines+markers" if len(found.timesteps) <= MARKED_POINTS else "lines"
    curve = {"x": found.timesteps, "y": found.mean, "line": style.line(1.8), "marker": style.marker(6)}
    return go.Scatter(name=label, legendgroup=label, mode=mode, **curve)


def _span(label: str, found: Series, style: Style, *, pale: bool) -> list[go.Scatter]:
    """A band of the seeds, or a thin line for each where they are far apart.

    A logarithmic axis has no place for zero: it is left out of the band.
    """
    span = list(zip(found.timesteps, found.least, found.most, strict=True))
    common = {"legendgroup": label, "showlegend": False, "mode": "lines", "hoverinfo": "skip"}
    if found.least == found.most:
        return []
    if any(high > FAR_APART * low for _, low, high in span):
        thin = {"color": style.area(0.3 if pale else 0.5), "width": 1}
        return [go.Scatter(x=found.timesteps, y=seed, line=thin, **common) for seed in found.seeds]
    positive = [(t, low, high) for t, low, high in span if low > 0]
    x = [t for t, _, _ in (*positive, *reversed(positive))]
    y = [high for _, _, high in positive] + [low for _, low, _ in reversed(positive)]
    colour = style.area(0.05 if pale else 0.15)
    return [go.Scatter(x=x, y=y, fill="toself", fillcolor=colour, line={"width": 0}, **common)]


def unit_errors(group: Group, styles: Mapping[str, Style]) -> Chart:
    """Every unit's error before and after learning, mean over seeds."""
    note = (
        "Error of a unit's outputs relative to their variance, before (open) and after learning (filled); mean over seeds. "
        f"Units in the network's order from the top, {MAX_UNITS} at most."
    )
    found = [(variant, tables) for variant in group.quantized if (tables := variant.tables(UNITS))]
    views = [(variant.name, _units(tables, styles[variant.label])) for variant, tables in found]
    return Chart("Reconstruction error per unit", note, views, wide=True)


def _units(tables: Sequence[Rows], style: Style) -> go.Figure:
    units = group_by(chain(*tables), lambda row: row["unit"])
    names = list(units)[:MAX_UNITS]
    before, after = (
        [statistics.mean(row[column] for row in units[name]) for name in names]
        for column in ("error_before", "error_after")
    )
    joined = [value for pair in zip(before, after, strict=True) for value in (*pair, None)]
    line = {"color": NEUTRAL, "width": 1}
    repeated = [name for name in names for _ in range(3)]
    traces = [go.Scatter(x=joined, y=repeated, mode="lines", line=line, showlegend=False, hoverinfo="skip")]
    for name, errors, symbol in (("before", before, "circle-open"), ("after", after, "circle")):
        marker = {"symbol": symbol, "color": style.colour, "size": 9}
        traces.append(go.Scatter(name=name, x=errors, y=names, mode="markers", marker=marker))
    x = log_axis("error / variance ↓", [*before, *after])
    return figure(traces, x, category_axis(), height=110 + 19 * len(names))


def losses(group: Group) -> Chart:
    """Loss curves of the units, of the first seed that has them: seeds have curves of their own."""
    note = (
        "One curve for each unit, early units dark and late ones light; the first seed that has them. "
        f"{MAX_LOSSES} units at most, evenly spread."
    )
    found = [(variant, tables[0]) for variant in group.quantized if (tables := variant.tables(LOSSES))]
    views = [(f"{variant.name}, {phase}", drawn) for variant, rows in found for phase, drawn in _losses(rows)]
    return Chart("Loss while learning", note, views)


def _losses(rows: Rows) -> Iterator[tuple[str, go.Figure]]:
    for phase, in_phase in group_by(rows, lambda row: row["phase"]).items():
        units = group_by(in_phase, lambda row: row["unit"])
        names = list(units)
        if len(names) > MAX_LOSSES:
            names = [names[i * len(names) // MAX_LOSSES] for i in range(MAX_LOSSES)]
        shades = sample_colorscale("Viridis", [0.85 * i / max(1, len(names) - 1) for i in range(len(names))])
        traces: list[go.Scatter] = []
        for name, shade in zip(names, shades, strict=True):
            points = sorted((row["iteration"], row["loss"]) for row in units[name])
            x, y = zip(*(points[i] for i in thinned(len(points))), strict=True)
            mode, line = "lines" if len(x) > 1 else "markers", {"color": shade, "width": 1.4}
            shown = len(names) <= MAX_LEGEND
            traces.append(go.Scatter(name=name, x=x, y=y, mode=mode, line=line, showlegend=shown))
        yield phase, figure(traces, axis("iteration"), log_axis("loss", [row["loss"] for row in in_phase]))

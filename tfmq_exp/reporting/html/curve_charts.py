"""Errors along the sampling steps: a curve for every way, mean over its seeds, with what the seeds span around it."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import plotly.graph_objects as go

from tfmq_exp.reporting.html.chart import Chart, axis, figure, kept, log_axis, many
from tfmq_exp.reporting.html.palette import Look
from tfmq_exp.reporting.html.ways import Group, Way


@dataclass(frozen=True)
class Curve:
    """A column over timesteps: at every one the mean over seeds, the least, and the most."""

    timesteps: tuple[float, ...]
    mean: tuple[float, ...]
    least: tuple[float, ...]
    most: tuple[float, ...]


def curve(way: Way, file: str, column: str) -> Curve | None:
    """The curve of a way; only timesteps that every seed has."""
    seeds = [
        {row["t"]: row[column] for row in rows} for member in way.members if (rows := member.run.tables.get(file, ()))
    ]
    if not seeds:
        return None
    shared = sorted(set[float].intersection(*(set(seed) for seed in seeds)), reverse=True)
    drawn = [shared[i] for i in kept(len(shared))]
    if not drawn:
        return None
    at = [[seed[t] for seed in seeds] for t in drawn]
    means = tuple(statistics.mean(found) for found in at)
    return Curve(tuple(drawn), means, tuple(map(min, at)), tuple(map(max, at)))


def temporal_error(group: Group, looks: Mapping[str, Look]) -> Chart | None:
    """Error of the temporal features per timestep."""
    note = "Squared error of the temporal features, relative to the float network's; the band spans the seeds."
    y = "squared error / float power ↓"
    return _chart("Temporal-feature error per timestep", note, group, looks, "temporal_error.csv", "relative_mse", y)


def trajectory_error(group: Group, looks: Mapping[str, Look]) -> Chart | None:
    """Distance of the trajectories along the steps."""
    note = "Distance of the quantized trajectory to the float network's from the same seeds; the band spans the seeds."
    y = "mean squared error / variance ↓"
    return _chart("Trajectory error along the steps", note, group, looks, "trajectory_error.csv", "x_error", y)


def noise_error(group: Group, looks: Mapping[str, Look]) -> Chart | None:
    """Error of the predicted noise along the float trajectory."""
    note = "Error of one prediction at a time, on the float network's trajectory; the band spans the seeds."
    y = "mean squared error / variance ↓"
    return _chart("Error of the noise prediction", note, group, looks, "trajectory_error.csv", "eps_error", y)


def _chart(
    title: str, note: str, group: Group, looks: Mapping[str, Look], file: str, column: str, y: str
) -> Chart | None:
    views: list[tuple[str, go.Figure]] = []
    for bits in group.bits:
        curves = {way.label: curve(way, file, column) for way in group.quantized if way.bits == bits}
        there = {label: found for label, found in curves.items() if found is not None}
        traces = [
            trace for label, found in there.items() for trace in _traces(label, found, looks[label], pale=many(there))
        ]
        if traces:
            drawn = [value for found in there.values() for value in (*found.least, *found.most)]
            x = axis("timestep t (sampling goes to the right)", autorange="reversed")
            views.append((bits, figure(traces, x, log_axis(y, drawn))))
    return Chart(title, note, tuple(views), wide=many(looks)) if views else None


def _traces(label: str, found: Curve, look: Look, *, pale: bool) -> Sequence[go.Scatter]:
    """Band and line. A logarithmic axis has no place for zero: it is left out of the band. Many bands are pale."""
    line = go.Scatter(
        name=label,
        legendgroup=label,
        x=found.timesteps,
        y=found.mean,
        mode="lines+markers" if len(found.timesteps) <= 50 else "lines",
        line={"color": look.colour, "dash": look.dash, "width": 1.8},
        marker={"color": look.colour, "symbol": look.symbol, "size": 6},
    )
    if found.least == found.most:
        return [line]
    around = [(t, low, high) for t, low, high in zip(found.timesteps, found.least, found.most, strict=True) if low > 0]
    band = go.Scatter(
        legendgroup=label,
        showlegend=False,
        x=[t for t, _, _ in around] + [t for t, _, _ in reversed(around)],
        y=[high for _, _, high in around] + [low for _, low, _ in reversed(around)],
        fill="toself",
        fillcolor=look.fill(0.05 if pale else 0.15),
        mode="lines",
        line={"width": 0},
        hoverinfo="skip",
    )
    return [band, line]

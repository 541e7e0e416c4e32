"""Errors along the sampling steps: a curve for every way, mean over its seeds, with what the seeds span around it."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import plotly.graph_objects as go

from tfmq_exp.report.html.chart import Chart, axis, figure, kept, log_axis, many
from tfmq_exp.report.html.palette import Look
from tfmq_exp.report.html.ways import Group, Way

APART = 10  # times the least seed's value: a band from there on covers the others' lines on a logarithmic axis
SPAN = "the band spans the seeds, which are thin lines where they are far apart"


@dataclass(frozen=True)
class Curve:
    """A column over timesteps: at every one the mean over seeds; `seeds` has a curve for each."""

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

    @property
    def apart(self) -> bool:
        """Whether some timestep's seeds are so far apart that their mean is that of the greatest."""
        return any(high > APART * low for low, high in zip(self.least, self.most, strict=True))


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
    curves = tuple(tuple(seed[t] for t in drawn) for seed in seeds)
    means = tuple(statistics.mean(found) for found in zip(*curves, strict=True))
    return Curve(tuple(drawn), means, curves)


def temporal_error(group: Group, looks: Mapping[str, Look]) -> Chart | None:
    """Error of the temporal features per timestep."""
    note = f"Squared error of the temporal features, relative to the float network's; {SPAN}."
    y = "squared error / float power ↓"
    return _chart("Temporal-feature error per timestep", note, group, looks, "temporal_error.csv", "relative_mse", y)


def trajectory_error(group: Group, looks: Mapping[str, Look]) -> Chart | None:
    """Distance of the trajectories along the steps."""
    note = f"Distance of the quantized trajectory to the float network's from the same seeds; {SPAN}."
    y = "mean squared error / variance ↓"
    return _chart("Trajectory error along the steps", note, group, looks, "trajectory_error.csv", "x_error", y)


def noise_error(group: Group, looks: Mapping[str, Look]) -> Chart | None:
    """Error of the predicted noise along the float trajectory."""
    note = f"Error of one prediction at a time, on the float network's trajectory; {SPAN}."
    y = "mean squared error / variance ↓"
    return _chart("Error of the noise prediction", note, group, looks, "trajectory_error.csv", "eps_error", y)


def _chart(
    title: str, note: str, group: Group, looks: Mapping[str, Look], file: str, column: str, y: str
) -> Chart | None:
    views: list[tuple[str, go.Figure]] = []
    for bits in group.bits:
        curves = {way.label: curve(way, file, column) for way in group.quantized if way.bits == bits}
        there = {label: found for label, found in curves.items() if found is not None}
        spans = [span for label, found in there.items() for span in _span(label, found, looks[label], pale=many(there))]
        lines = [_line(label, found, looks[label]) for label, found in there.items()]
        traces = [*spans, *lines]  # no span covers a line
        if traces:
            drawn = [value for found in there.values() for value in (*found.least, *found.most)]
            x = axis("timestep t (sampling goes to the right)", autorange="reversed")
            views.append((bits, figure(traces, x, log_axis(y, drawn))))
    return Chart(title, note, tuple(views), wide=many(looks)) if views else None


def _line(label: str, found: Curve, look: Look) -> go.Scatter:
    """The mean over seeds."""
    return go.Scatter(
        name=label,
        legendgroup=label,
        x=found.timesteps,
        y=found.mean,
        mode="lines+markers" if len(found.timesteps) <= 50 else "lines",
        line={"color": look.colour, "dash": look.dash, "width": 1.8},
        marker={"color": look.colour, "symbol": look.symbol, "size": 6},
    )


def _span(label: str, found: Curve, look: Look, *, pale: bool) -> Sequence[go.Scatter]:
    """What the seeds span: a band, or a thin line for each where they are far apart. Many are pale.

    A logarithmic axis has no place for zero: it is left out of the band.
    """
    if found.least == found.most:
        return []
    if found.apart:
        thin = {"color": look.fill(0.3 if pale else 0.5), "width": 1}
        own = {"legendgroup": label, "showlegend": False, "mode": "lines", "line": thin, "hoverinfo": "skip"}
        return [go.Scatter(x=found.timesteps, y=seed, **own) for seed in found.seeds]
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
    return [band]

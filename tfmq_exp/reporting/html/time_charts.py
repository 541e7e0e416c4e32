"""Where time and memory went: bars of stages for every way, and a table of what was computed and what was found."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import plotly.graph_objects as go

from tfmq_exp.report.html.chart import NEUTRAL, Chart, axis, figure
from tfmq_exp.report.html.palette import STAGE_COLOURS
from tfmq_exp.report.html.runs import Run
from tfmq_exp.report.html.ways import Group, Way

BARS = 60  # ways in one chart


@dataclass(frozen=True)
class StageLine:
    """A stage of one way: how often it was computed and found, and means of seconds and of the peak."""

    way: str
    stage: str
    computed: int
    found: int
    seconds: float | None
    took: float | None
    peak_mib: float | None


def number(run: Run, stage: str, name: str) -> float | None:
    """A number of a stage, or None where there is none."""
    value = run.stages.get(stage, {}).get(name)
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def stage_lines(group: Group) -> list[StageLine]:
    """Every stage of every way."""
    lines: list[StageLine] = []
    for way in group.quantized:
        runs = [member.run for member in way.members]
        for stage in dict.fromkeys(name for run in runs for name in run.stages):
            made = [run.stages[stage].get("computed") is True for run in runs if stage in run.stages]
            seconds, took, peak = (_mean(runs, stage, name) for name in ("seconds", "took", "peak_mib"))
            name = f"{way.bits} {way.label}"
            lines.append(StageLine(name, stage, sum(made), len(made) - sum(made), seconds, took, peak))
    return lines


def _mean(runs: Sequence[Run], stage: str, name: str) -> float | None:
    found = [value for run in runs if (value := number(run, stage, name)) is not None]
    return statistics.mean(found) if found else None


def stage_times(group: Group) -> Chart | None:
    """Stacked bars of seconds: what stages take, what these runs spent; and the peak of memory."""
    ways = [way for way in group.quantized if any(member.run.stages for member in way.members)][:BARS]
    if not ways:
        return None
    stages = list(dict.fromkeys(name for way in ways for member in way.members for name in member.run.stages))
    colours = {stage: STAGE_COLOURS[i % len(STAGE_COLOURS)] for i, stage in enumerate(stages)}
    views = (
        ("what stages take", _stacked(ways, colours, "took")),
        ("what these runs spent", _stacked(ways, colours, "seconds")),
        ("peak memory", _peak(ways)),
    )
    note = (
        "Mean over seeds. What a stage takes is what it took whoever made it; a run that finds it in the store spends less. "
        f"The peak is of the whole process up to then. {BARS} ways at most."
    )
    if any(way.engine for way in ways):
        note += " A way that an engine executed has that engine's stages alone; it needed those of its simulation, too."
    return Chart("Stages", note, views, wide=True)


def _stacked(ways: Sequence[Way], colours: Mapping[str, str], what: str) -> go.Figure:
    names = [f"{way.bits} {way.label}" for way in ways]
    traces = [
        go.Bar(
            name=stage,
            y=names,
            x=[_mean([member.run for member in way.members], stage, what) or 0.0 for way in ways],
            orientation="h",
            marker={"color": colour},
        )
        for stage, colour in colours.items()
    ]
    return _bars(traces, "seconds", names, barmode="stack")


def _peak(ways: Sequence[Way]) -> go.Figure:
    names = [f"{way.bits} {way.label}" for way in ways]
    peaks = [
        max((number(m.run, stage, "peak_mib") or 0.0 for m in way.members for stage in m.run.stages), default=0.0)
        for way in ways
    ]
    bar = go.Bar(name="peak", y=names, x=peaks, orientation="h", marker={"color": NEUTRAL}, showlegend=False)
    return _bars([bar], "MiB", names)


def _bars(traces: Sequence[go.Bar], unit: str, names: Sequence[str], **layout: str) -> go.Figure:
    y = {"type": "category", "autorange": "reversed", "dtick": 1, "tickfont": {"size": 11}}
    return figure(traces, axis(unit, rangemode="tozero"), y, height=110 + 24 * len(names), bargap=0.3, **layout)

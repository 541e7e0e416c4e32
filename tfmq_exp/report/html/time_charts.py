"""Time and memory: bars of stages for every variant, and a table of what was computed and what was found in the store."""

import statistics
from collections.abc import Sequence
from typing import NamedTuple

import plotly.graph_objects as go

from tfmq_exp.report.html.charts import Chart, axis, category_axis, figure
from tfmq_exp.report.html.grouping import Group, Variant
from tfmq_exp.report.html.theme import NEUTRAL, STAGE_COLOURS
from tfmq_exp.report.records import is_number

MAX_BARS = 60  # in one chart
NUMBERS = ("seconds", "took", "peak_mib")  # of a stage


class StageRow(NamedTuple):
    """A stage of one variant: how often it was computed and found, and means of seconds and of the peak."""

    variant: str
    stage: str
    computed: int
    found: int
    seconds: float | None
    took: float | None
    peak_mib: float | None


def stage_rows(group: Group) -> list[StageRow]:
    """Every stage of every variant."""
    rows: list[StageRow] = []
    for variant in group.quantized:
        for stage in _stages([variant]):
            computed = [run.stages[stage].get("computed") is True for run in variant.runs if stage in run.stages]
            counts = sum(computed), len(computed) - sum(computed)
            rows.append(StageRow(variant.name, stage, *counts, *(_mean(variant, stage, name) for name in NUMBERS)))
    return rows


def stage_times(group: Group) -> Chart:
    """Stacked bars of seconds, which stages take and which these runs spent; and the peak of memory."""
    variants = [variant for variant in group.quantized if _stages([variant])][:MAX_BARS]
    note = (
        "Mean over seeds. A stage takes what it took the run that computed it; a run that finds it in the store spends less. "
        f"The peak is of the whole process up to then. {MAX_BARS} variants at most."
    )
    if any(variant.engine for variant in variants):
        note += (
            " A variant that an engine executed has that engine's stages alone; it needed those of its simulation, too."
        )
    stages = _stages(variants)
    peaks = [max([0.0, *(n for stage in stages for n in _numbers(v, stage, "peak_mib"))]) for v in variants]
    colours = {stage: STAGE_COLOURS[i % len(STAGE_COLOURS)] for i, stage in enumerate(stages)}

    def bar(name: str, values: Sequence[float], colour: str, **more: bool) -> go.Bar:
        names = [variant.name for variant in variants]
        return go.Bar(name=name, y=names, x=values, orientation="h", marker={"color": colour}, **more)

    def bars(traces: Sequence[go.Bar], unit: str, **layout: str) -> go.Figure:
        height = 110 + 24 * len(variants)
        return figure(traces, axis(unit, rangemode="tozero"), category_axis(), height=height, bargap=0.3, **layout)

    def stacked(number: str) -> go.Figure:
        averages = {stage: [_mean(variant, stage, number) or 0.0 for variant in variants] for stage in stages}
        return bars([bar(stage, averages[stage], colours[stage]) for stage in stages], "seconds", barmode="stack")

    memory = bars([bar("peak", peaks, NEUTRAL, showlegend=False)], "MiB")
    views = [
        ("what stages take", stacked("took")),
        ("what these runs spent", stacked("seconds")),
        ("peak memory", memory),
    ]
    return Chart("Stages", note, views if variants else [], wide=True)


def _stages(variants: Sequence[Variant]) -> list[str]:
    return list(dict.fromkeys(stage for variant in variants for run in variant.runs for stage in run.stages))


def _numbers(variant: Variant, stage: str, name: str) -> list[float]:
    found = [run.stages.get(stage, {}).get(name) for run in variant.runs]
    return [float(value) for value in found if is_number(value)]


def _mean(variant: Variant, stage: str, name: str) -> float | None:
    numbers = _numbers(variant, stage, name)
    return statistics.mean(numbers) if numbers else None

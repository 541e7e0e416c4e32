"""The page: everything about some runs in one HTML file that loads nothing else."""

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from tfmq_exp.report.html import curve_charts, learning_charts, score_charts, time_charts
from tfmq_exp.report.html.chart import Chart
from tfmq_exp.report.html.concerns import concerns, is_smoke
from tfmq_exp.report.html.configurations import differences, full
from tfmq_exp.report.html.diagnosis import diagnoses
from tfmq_exp.report.html.executed import executed
from tfmq_exp.report.html.missing import gaps
from tfmq_exp.report.html.palette import Look, looks
from tfmq_exp.report.html.papers import PaperLine, beside, unmeasured
from tfmq_exp.report.html.pictures import albums, sample_files
from tfmq_exp.report.html.runs import GOOD, SITES, STATES, Run
from tfmq_exp.report.html.scores import ScoreTable, score_table
from tfmq_exp.report.html.time_charts import StageLine, stage_lines
from tfmq_exp.report.html.ways import Group, groups
from tfmq_exp.report.published_tables import PublishedRow
from tfmq_exp.report.tables import bits_order, execution

TEMPLATES = PackageLoader("tfmq_exp.report.html", "templates")


@dataclass(frozen=True)
class GroupView:
    """What the page shows of a group."""

    group: Group
    execution: str
    concerns: tuple[str, ...]
    table: ScoreTable
    papers: tuple[PaperLine, ...]
    charts: tuple[Chart, ...]
    time: Chart | None
    stages: tuple[StageLine, ...]


@dataclass(frozen=True)
class Summary:
    """What was run, in numbers and names.

    Args:
        models: those with scores, or where there are no scores all of them.
        unscored: models of runs none of which has scores, beside others that have.
        smoke: runs that were made to see that they run.
        states: of folders of runs alone.
        engines: that executed some model.
        records: those of saved files.
    """

    models: tuple[str, ...]
    unscored: tuple[str, ...]
    smoke: int
    bits: tuple[str, ...]
    methods: tuple[str, ...]
    seeds: tuple[str, ...]
    images: tuple[str, ...]
    evaluators: tuple[str, ...]
    engines: tuple[str, ...]
    states: Mapping[str, int]
    records: int


def page(runs: Sequence[Run], published: Sequence[PublishedRow]) -> str:
    """The page of these runs, with the published numbers of their models."""
    together = groups(runs)
    look = looks(way.label for group in together for way in group.quantized)
    problems: list[str] = []  # of files that are read here
    files, there = sample_files(together, runs)
    samples = albums(files, problems)
    found, undiagnosed = diagnoses(runs, problems)
    views = [view(group, published, look) for group in together]
    template = environment().get_template("page.html.j2")
    return template.render(
        good=GOOD,
        summary=summary(runs, together),
        views=views,
        samples=samples,
        pictures_left_out=there - len(files),
        diagnoses=found,
        undiagnosed=undiagnosed,
        executed=executed(runs),
        differences=differences(runs),
        runs=[(run, full(run.config)) for run in runs],
        gaps=gaps(runs),
        unmeasured=unmeasured(together, published),
        published_models={row.model for row in published},
        problems=problems,
        plotly=Markup(get_plotlyjs()),
    )


def view(group: Group, published: Sequence[PublishedRow], look: Mapping[str, Look]) -> GroupView:
    """Tables and charts of one group."""
    charts = (
        score_charts.scores_by_bits(group, look),
        score_charts.pareto(group, look),
        curve_charts.temporal_error(group, look),
        curve_charts.trajectory_error(group, look),
        curve_charts.noise_error(group, look),
        learning_charts.unit_errors(group, look),
        learning_charts.losses(group),
    )
    table = score_table(group)
    return GroupView(
        group,
        execution([record for way in group.ways for record in way.records]),
        concerns(group, table),
        table,
        tuple(beside(group, published)),
        tuple(chart for chart in charts if chart is not None),
        time_charts.stage_times(group),
        tuple(stage_lines(group)),
    )


def summary(runs: Sequence[Run], together: Sequence[Group]) -> Summary:
    """What was run."""
    folders = [run for run in runs if not run.saved]
    counts = Counter(run.state for run in folders)
    ways = [way for group in together for way in group.quantized]

    def names(group: str) -> list[str]:
        return [run.choice(group) for run in folders if run.config]

    scored = tuple(dict.fromkeys(group.model for group in together))
    configured = tuple(dict.fromkeys(names("model")))
    seeds = {str(record.seed) for way in ways for record in way.records}
    return Summary(
        scored or configured,
        tuple(name for name in configured if scored and name not in scored),
        sum(map(is_smoke, folders)),
        tuple(sorted({*(way.bits for way in ways), *names("quant")}, key=bits_order)),
        tuple(sorted({*(r.method for way in ways for r in way.records), *names("method")})),
        tuple(sorted(seeds, key=lambda seed: (len(seed), seed))),
        tuple(dict.fromkeys(str(group.protocol["images"]) for group in together if "images" in group.protocol)),
        tuple(dict.fromkeys(group.judge for group in together)),
        tuple(sorted({*(way.engine for way in ways), *(run.engine for run in runs if SITES in run.tables)} - {""})),
        {state: counts[state] for state in STATES},
        sum(len(run.records) for run in runs if run.saved),
    )


def environment() -> Environment:
    """Templates that escape whatever comes from a file, and fail on a name that is not given."""
    made = Environment(
        loader=TEMPLATES,
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters["embedded"] = embedded
    made.filters["source"] = lambda name: Markup(TEMPLATES.get_source(made, name)[0])
    return made


def embedded(data: Any) -> Markup:
    """JSON that may stand inside a script element: nothing in it can end the element."""
    text = json.dumps(_finite(data), allow_nan=False, separators=(",", ":"))
    return Markup(text.replace("<", "\\u003c"))


def _finite(data: Any) -> Any:
    """The data with null for numbers that JSON has no word for: a chart leaves these points out."""
    if isinstance(data, Mapping):
        return {key: _finite(value) for key, value in data.items()}
    if isinstance(data, list | tuple):
        return [_finite(value) for value in data]
    return None if isinstance(data, float) and not math.isfinite(data) else data

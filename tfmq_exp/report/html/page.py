"""The page: everything about some runs in one HTML file that loads nothing else."""

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from tfmq_exp.report.html.config_diff import config_diffs
from tfmq_exp.report.html.coverage import missing_seeds
from tfmq_exp.report.html.deployment import deployments
from tfmq_exp.report.html.grouping import Group, group_runs
from tfmq_exp.report.html.pictures import albums, diagnosis_folders, sample_files
from tfmq_exp.report.html.published_rows import compared_rows, unmeasured_rows
from tfmq_exp.report.html.run_charts import error_charts, losses, unit_errors
from tfmq_exp.report.html.run_reader import GOOD_STATES, SITES, STATES, Run
from tfmq_exp.report.html.score_charts import pareto, scores_by_bits
from tfmq_exp.report.html.score_ranking import score_table
from tfmq_exp.report.html.theme import Style, styles
from tfmq_exp.report.html.time_charts import stage_rows, stage_times
from tfmq_exp.report.html.warnings import is_smoke, warnings
from tfmq_exp.report.published_tables import PublishedRow
from tfmq_exp.report.tables import bits_order, execution, scored_by

TEMPLATES = PackageLoader("tfmq_exp.report.html", "templates")


def render_page(runs: Sequence[Run], published: Sequence[PublishedRow]) -> str:
    """Render the page of these runs, with the published numbers of their models."""
    groups = group_runs(runs)
    style = styles(variant.label for group in groups for variant in group.quantized)
    problems: list[str] = []  # of files that are read here
    files, count = sample_files(groups, runs)
    samples = albums(files, problems)
    diagnoses, undiagnosed = diagnosis_folders(runs, problems)
    return (
        environment()
        .get_template("page.html.j2")
        .render(
            good=GOOD_STATES,
            summary=summary(runs, groups),
            views=[group_view(group, published, style) for group in groups],
            samples=samples,
            pictures_left_out=count - len(files),
            diagnoses=diagnoses,
            undiagnosed=undiagnosed,
            deployments=deployments(runs),
            config_diffs=config_diffs(runs),
            runs=[(run, _as_yaml(run.config)) for run in runs],
            missing=missing_seeds(runs),
            unmeasured=unmeasured_rows(groups, published),
            published_models={row.model for row in published},
            problems=problems,
            plotly=Markup(get_plotlyjs()),
        )
    )


def group_view(group: Group, published: Sequence[PublishedRow], style: Mapping[str, Style]) -> dict[str, Any]:
    """The contents of a group's section."""
    table = score_table(group)
    scores = [scores_by_bits(group, style), pareto(group, style)]
    charts = [*scores, *error_charts(group, style), unit_errors(group, style), losses(group)]
    return {
        "group": group,
        "scored_by": scored_by(group.first),
        "execution": execution(group.records),
        "warnings": warnings(group, table),
        "table": table,
        "published": compared_rows(group, published),
        "charts": [chart for chart in charts if chart.views],
        "time": stage_times(group),
        "stages": stage_rows(group),
    }


def summary(runs: Sequence[Run], groups: Sequence[Group]) -> dict[str, Any]:
    """Summary of the runs in numbers and names. Models without scores are listed apart if others have some."""
    folders = [run for run in runs if not run.saved]
    states = Counter(run.state for run in folders)
    variants = [variant for group in groups for variant in group.quantized]
    records = [record for variant in variants for record in variant.records]

    def configured(group: str) -> list[str]:
        return list(dict.fromkeys(run.configured(group) for run in folders if run.config))

    first = [group.first for group in groups]
    scored = list(dict.fromkeys(record.model for record in first))
    engines = {variant.engine for variant in variants} | {run.engine for run in runs if SITES in run.tables}
    return {
        "models": scored or configured("model"),
        "unscored": [name for name in configured("model") if scored and name not in scored],
        "smoke": sum(map(is_smoke, folders)),
        "bits": sorted({*(record.quant for record in records), *configured("quant")}, key=bits_order),
        "methods": sorted({*(record.method for record in records), *configured("method")}),
        "seeds": sorted({str(record.seed) for record in records}, key=lambda seed: (len(seed), seed)),
        "images": list(
            dict.fromkeys(str(record.protocol["images"]) for record in first if "images" in record.protocol)
        ),
        "evaluators": list(dict.fromkeys(map(scored_by, first))),
        "engines": sorted(engines - {""}),
        "states": {state: states[state] for state in STATES},
        "records": sum(len(run.records) for run in runs if run.saved),
    }


def _as_yaml(config: Mapping[str, Any]) -> str:
    return yaml.safe_dump(dict(config), sort_keys=False, allow_unicode=True, width=110) if config else ""


def environment() -> Environment:
    """Templates that escape all text of files, and fail on an unknown name."""
    made = Environment(
        loader=TEMPLATES, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    made.filters["embedded"] = embedded
    made.filters["source"] = lambda name: Markup(TEMPLATES.get_source(made, name)[0])
    return made


def embedded(data: Any) -> Markup:
    """JSON inside a script element: nothing in it can end the element."""
    text = json.dumps(_finite(data), allow_nan=False, separators=(",", ":"))
    return Markup(text.replace("<", "\\u003c"))


def _finite(data: Any) -> Any:
    """The data with null for numbers that JSON does not have: a chart leaves these points out."""
    if isinstance(data, Mapping):
        return {key: _finite(value) for key, value in data.items()}
    if isinstance(data, list | tuple):
        return [_finite(value) for value in data]
    return None if isinstance(data, float) and not math.isfinite(data) else data

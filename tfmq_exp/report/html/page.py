"""The page: everything about some runs in one HTML file that loads nothing else."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import yaml
from markupsafe import Markup
from plotly.offline import get_plotlyjs
from plotly.utils import PlotlyJSONEncoder

from tfmq_exp.report.comparability import bits_order, scored_by
from tfmq_exp.report.comparison import published_rows
from tfmq_exp.report.html.charts import LIMITS, MANY_CURVES, Style, Views, styles
from tfmq_exp.report.html.configurations import config_diffs, missing_seeds
from tfmq_exp.report.html.deployment import deployments
from tfmq_exp.report.html.environment import page_environment
from tfmq_exp.report.html.grouping import Group, group_runs
from tfmq_exp.report.html.paired_view import paired_view
from tfmq_exp.report.html.pictures import albums, diagnosis_folders
from tfmq_exp.report.html.run_charts import ERRORS, error_curves, losses, stage_rows, stage_times, unit_errors
from tfmq_exp.report.html.run_reader import GOOD_STATES, SITES, STATES, Run
from tfmq_exp.report.html.score_charts import pareto, scores_by_bits
from tfmq_exp.report.html.score_table import score_table, warnings
from tfmq_exp.report.published_tables import PublishedRow
from tfmq_exp.report.tables import execution

YAML = {"sort_keys": False, "allow_unicode": True, "width": 110}


def render_page(runs: Sequence[Run], published: Sequence[PublishedRow]) -> str:
    """Render the page of these runs, with the published numbers of their models."""
    groups = group_runs(runs)
    style = styles(variant.label for group in groups for variant in group.quantized)
    problems: list[str] = []  # of files that are read here
    samples, pictures_left_out = albums(groups, runs, problems)
    diagnoses, undiagnosed = diagnosis_folders(runs, problems)
    views = [group_view(group, published, style, problems) for group in groups]
    unmeasured: dict[str, dict[str, list[str]]] = {}  # by model and published table: rows that no group has a run of
    for view in views:
        tables = unmeasured.setdefault(view["model"], view["unmeasured"])
        tables |= {name: [row for row in rows if row in tables[name]] for name, rows in view["unmeasured"].items()}
    environment = page_environment()
    environment.filters["embedded"] = embedded
    return environment.get_template("page.html.j2").render(
        good=GOOD_STATES,
        limits=LIMITS,
        wide=len(style) > MANY_CURVES,
        summary=summary(runs, groups),
        views=views,
        samples=samples,
        pictures_left_out=pictures_left_out,
        diagnoses=diagnoses,
        undiagnosed=undiagnosed,
        deployments=deployments(runs),
        config_diffs=config_diffs(runs),
        runs=[(run, yaml.safe_dump(dict(run.config), **YAML) if run.config else "") for run in runs],
        missing=missing_seeds(runs),
        unmeasured={model: {k: v for k, v in tables.items() if v} for model, tables in unmeasured.items()},
        published_models={row.model for row in published},
        problems=problems,
        plotly=Markup(get_plotlyjs()),
    )


def group_view(
    group: Group, published: Sequence[PublishedRow], style: Mapping[str, Style], problems: list[str]
) -> dict[str, Any]:
    """The contents of a group's section; files that cannot be read are added to the problems."""
    (columns, lines), stages = score_table(group), stage_rows(group)
    compared, unmeasured = published_rows(group.records, published)
    charts = {"scores": scores_by_bits(group, style), "pareto": pareto(group, style)}
    charts |= {name: error_curves(group, style, name) for name in ERRORS}
    return {
        "group": group,
        "model": group.first.model,
        "scored_by": scored_by(group.first),
        "execution": execution(group.records),
        "warnings": list(warnings(group, columns, lines)),
        "columns": columns,
        "lines": lines,
        "published": compared,
        "unmeasured": unmeasured,
        "images": paired_view(group, problems),
        "charts": charts | {"units": unit_errors(group, style), "losses": losses(group)},
        "time": stage_times(stages),
        "stages": stages,
    }


def summary(runs: Sequence[Run], groups: Sequence[Group]) -> dict[str, Any]:
    """Summary of the runs in numbers and names. Models without scores are listed apart if others have some."""
    folders = [run for run in runs if not run.saved]
    states = Counter(run.state for run in folders)
    variants = [variant for group in groups for variant in group.quantized]
    records = [record for variant in variants for record in variant.records]
    kinds = ("model", "quant", "method")
    models, quants, methods = ([run.configured(kind) for run in folders if run.config] for kind in kinds)
    first = [group.first for group in groups]
    scored = dict.fromkeys(record.model for record in first)
    engines = {variant.engine for variant in variants} | {run.engine for run in runs if SITES in run.tables}
    return {
        "models": list(scored or dict.fromkeys(models)),
        "unscored": [name for name in dict.fromkeys(models) if scored and name not in scored],
        "smoke": sum(run.is_smoke for run in folders),
        "bits": sorted({*(record.quant for record in records), *quants}, key=bits_order),
        "methods": sorted({*(record.method for record in records), *methods}),
        "seeds": sorted({str(record.seed) for record in records}, key=lambda seed: (len(seed), seed)),
        "images": list(dict.fromkeys(str(r.protocol["images"]) for r in first if "images" in r.protocol)),
        "evaluators": list(dict.fromkeys(map(scored_by, first))),
        "engines": sorted(engines - {""}),
        "states": {state: states[state] for state in STATES},
        "records": sum(len(run.records) for run in runs if run.saved),
    }


def embedded(views: Views) -> Markup:
    """JSON inside a script element: nothing in it can end the element; null for numbers that JSON does not have."""
    data = {"views": [{"name": name, "figure": figure} for name, figure in views.items()]}
    text = json.dumps(data, cls=PlotlyJSONEncoder, separators=(",", ":"))
    return Markup(text.replace("<", "\\u003c"))

"""A report in Weights & Biases that compares the runs of a project, or of one sweep.

    python scripts/wandb_report.py --entity TEAM [--project tfmq_exp] [--group SWEEP]    needs an account and wandb-workspaces
    python scripts/wandb_report.py --offline FOLDER [--group SWEEP]                      the same definition as report.json

Its sections: a table of bits by method with their scores, FID against bits, loss curves, errors over the sampling, samples.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from tfmq_exp.cli.terminal import Terminal, say_error, standard_streams

SCORES = ("scores/fid", "scores/sfid", "scores/is", "errors/temporal_cosine", "errors/trajectory", "cost/size_ratio")
BITS, METHOD = "quant.name", "method.name"


def main() -> int:
    """Write the definition, or save the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--project", default="tfmq_exp")
    parser.add_argument("--entity", default="", help="user or team that owns the project")
    parser.add_argument("--group", help="name of a sweep; all runs without it")
    parser.add_argument("--offline", type=Path, metavar="FOLDER", help="only write the definition there")
    args = parser.parse_args()
    content = definition(args.project, args.group)
    if args.offline:
        args.offline.mkdir(parents=True, exist_ok=True)
        place = args.offline / "report.json"
        place.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    else:
        try:
            if not args.entity:
                raise ValueError("--entity is missing: the owner of the project; --offline FOLDER needs none")
            report = build_report(content, args.entity)
            report.save()
        except (ImportError, ValueError) as error:
            say_error(Terminal(stderr=True), str(error))
            return 1
        place = report.url
    sys.stdout.write(f"{place}\n")
    return 0


def definition(project: str, group: str | None) -> dict[str, Any]:
    """The report as plain data: its runs, and section by section the panels.

    Names of metrics and settings are those that runs log; `group_by` joins the runs that differ in the seed alone.
    """

    def section(title: str, columns: list[str], panels: list[dict[str, Any]], group_by: tuple[str, ...] = ()) -> Any:
        return {"title": title, "group_by": list(group_by), "columns": columns, "panels": panels}

    def curve(title: str, x: str, y: str, *, log: bool) -> dict[str, Any]:
        return {"kind": "curve", "title": title, "x": x, "y": y, "log": log}

    scores = [
        {"kind": "bars", "title": "FID", "metrics": ["scores/fid"], "group_by": METHOD},
        {"kind": "scatter", "title": "FID against weight bits", "x": "quant.weight", "y": "scores/fid"},
        {"kind": "scatter", "title": "FID against size", "x": "cost/size_ratio", "y": "scores/fid"},
    ]
    errors = [
        curve("Temporal features: cosine", "timestep", "temporal_error/cosine", log=False),
        curve("Temporal features: relative error", "timestep", "temporal_error/relative_mse", log=True),
        curve("Noise prediction on the float path", "step", "trajectory_error/eps_error", log=True),
        curve("Distance of the trajectories", "step", "trajectory_error/x_error", log=True),
    ]
    losses = [
        {"kind": "curves", "title": f"Loss: {phase}", "x": "iteration", "pattern": f"loss/{phase}.*"}
        for phase in ("weights", "activations")
    ]
    units = {"kind": "table", "title": "Units", "table": "tables/units"}
    samples = {"kind": "images", "title": "Samples", "images": ["images/samples"]}
    return {
        "title": f"Quantization: {group or project}",
        "project": project,
        "group": group,
        "sections": [
            section("Bits by method", list(SCORES), scores, (BITS, METHOD)),
            section("Errors over the sampling", ["errors/temporal_cosine", "errors/trajectory"], errors),
            section("Learning", ["cost/quantization_seconds", "cost/peak_mib"], [*losses, units]),
            section("Samples, float and quantized from the same seeds", ["scores/fid"], [samples]),
        ],
    }


def build_report(content: dict[str, Any], entity: str) -> Any:
    """A wandb report of a definition; ImportError without wandb-workspaces."""
    try:
        import wandb_workspaces.reports.v2 as wr  # type: ignore[import-not-found]
    except ImportError as error:
        raise ImportError("reports are made with wandb-workspaces: pip install wandb-workspaces") from error

    project, group = content["project"], content["group"]
    blocks: list[Any] = [wr.TableOfContents()]
    for section in content["sections"]:
        runs = wr.Runset(
            entity=entity,
            project=project,
            name=group or "all runs",
            filters=f"Group = '{group}'" if group else "",
            groupby=[f"config.{key}" for key in section["group_by"]],
            pinned_columns=[f"summary:{name}" for name in section["columns"]],
        )
        panels = [build_panel(wr, spec) for spec in section["panels"]]
        blocks += [wr.H2(text=section["title"]), wr.PanelGrid(runsets=[runs], panels=panels)]
    return wr.Report(entity=entity, project=project, title=content["title"], blocks=blocks, width="fluid")


def build_panel(wr: Any, spec: dict[str, Any]) -> Any:
    """One panel of a definition; `wr` is wandb's module of reports."""
    title = spec["title"]
    match spec["kind"]:
        case "bars":
            return wr.BarPlot(title=title, metrics=spec["metrics"], groupby=wr.Config(spec["group_by"]))
        case "scatter":
            x = wr.SummaryMetric(spec["x"]) if "/" in spec["x"] else wr.Config(spec["x"])
            return wr.ScatterPlot(title=title, x=x, y=wr.SummaryMetric(spec["y"]))
        case "curve":
            return wr.LinePlot(title=title, x=spec["x"], y=[spec["y"]], log_y=spec["log"])
        case "curves":
            return wr.LinePlot(title=title, x=spec["x"], metric_regex=spec["pattern"], log_y=True)
        case "table":
            return wr.WeavePanelSummaryTable(table_name=spec["table"])
        case "images":
            return wr.MediaBrowser(title=title, media_keys=spec["images"], num_columns=2)


if __name__ == "__main__":
    with standard_streams():
        sys.exit(main())

"""A report in Weights & Biases that compares the runs of a project, or of one sweep.

    python scripts/wandb_report.py --entity TEAM [--project tfmq_exp] [--group SWEEP]    needs an account and wandb-workspaces
    python scripts/wandb_report.py --offline FOLDER [--group SWEEP]                      the same definition as report.json

It has a table of bits by method with their scores, FID against bits, loss curves, errors over the sampling, and samples.
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
    """Write the definition, or make the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--project", default="tfmq_exp")
    parser.add_argument("--entity", default="", help="user or team that owns the project")
    parser.add_argument("--group", help="name of a sweep; all runs without it")
    parser.add_argument("--offline", type=Path, metavar="FOLDER", help="only write the definition there")
    args = parser.parse_args()
    wanted = definition(args.project, args.group)
    if args.offline:
        args.offline.mkdir(parents=True, exist_ok=True)
        target = args.offline / "report.json"
        target.write_text(json.dumps(wanted, indent=2) + "\n", encoding="utf-8")
        print(target)
        return 0
    try:
        if not args.entity:
            raise ValueError("--entity says whose project it is; --offline FOLDER needs none")
        made = report(wanted, args.entity)
        made.save()
    except (ImportError, ValueError) as error:
        say_error(Terminal(stderr=True), str(error))
        return 1
    print(made.url)
    return 0


def definition(project: str, group: str | None) -> dict[str, Any]:
    """The report as plain data: which runs, and section by section what is drawn of them.

    Names of metrics and settings are those that runs log; `group_by` joins the runs that differ in the seed alone.
    """
    return {
        "title": f"Quantization: {group or project}",
        "project": project,
        "group": group,
        "sections": [
            {
                "title": "Bits by method",
                "group_by": [BITS, METHOD],
                "columns": list(SCORES),
                "panels": [
                    {"kind": "bars", "title": "FID", "metrics": ["scores/fid"], "group_by": METHOD},
                    {"kind": "scatter", "title": "FID against weight bits", "x": "quant.weight", "y": "scores/fid"},
                    {"kind": "scatter", "title": "FID against size", "x": "cost/size_ratio", "y": "scores/fid"},
                ],
            },
            {
                "title": "Errors over the sampling",
                "group_by": [],
                "columns": ["errors/temporal_cosine", "errors/trajectory"],
                "panels": [
                    curve("Temporal features: cosine", "timestep", "temporal_error/cosine", log=False),
                    curve("Temporal features: relative error", "timestep", "temporal_error/relative_mse", log=True),
                    curve("Noise prediction on the float path", "step", "trajectory_error/eps_error", log=True),
                    curve("Distance of the trajectories", "step", "trajectory_error/x_error", log=True),
                ],
            },
            {
                "title": "Learning",
                "group_by": [],
                "columns": ["cost/quantization_seconds", "cost/peak_mib"],
                "panels": [
                    {"kind": "curves", "title": f"Loss: {phase}", "x": "iteration", "pattern": f"loss/{phase}.*"}
                    for phase in ("weights", "activations")
                ]
                + [{"kind": "table", "title": "Units", "table": "tables/units"}],
            },
            {
                "title": "Samples, float and quantized from the same seeds",
                "group_by": [],
                "columns": ["scores/fid"],
                "panels": [{"kind": "images", "title": "Samples", "images": ["images/samples"]}],
            },
        ],
    }


def curve(title: str, axis: str, metric: str, *, log: bool) -> dict[str, Any]:
    """One curve of each run against its own axis."""
    return {"kind": "curve", "title": title, "x": axis, "y": metric, "log": log}


def report(wanted: dict[str, Any], entity: str) -> Any:
    """The definition as a report that can be saved.

    Raises:
        ImportError: wandb-workspaces is not installed.
    """
    try:
        import wandb_workspaces.reports.v2 as wr  # type: ignore[import-not-found]
    except ImportError as error:
        raise ImportError("reports are made with wandb-workspaces: pip install wandb-workspaces") from error

    blocks: list[Any] = [wr.TableOfContents()]
    for section in wanted["sections"]:
        runs = wr.Runset(
            entity=entity,
            project=wanted["project"],
            name=wanted["group"] or "all runs",
            filters=f"Group = '{wanted['group']}'" if wanted["group"] else "",
            groupby=[f"config.{key}" for key in section["group_by"]],
            pinned_columns=[f"summary:{name}" for name in section["columns"]],
        )
        panels = [panel(wr, spec) for spec in section["panels"]]
        blocks += [wr.H2(text=section["title"]), wr.PanelGrid(runsets=[runs], panels=panels)]
    return wr.Report(entity=entity, project=wanted["project"], title=wanted["title"], blocks=blocks, width="fluid")


def panel(wr: Any, spec: dict[str, Any]) -> Any:
    """One panel of a definition.

    Raises:
        ValueError: no such kind of panel.
    """
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
    raise ValueError(f"a panel is bars, scatter, curve, curves, table or images, got {spec['kind']!r}")


if __name__ == "__main__":
    with standard_streams():
        sys.exit(main())

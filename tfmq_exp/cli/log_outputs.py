"""Log the outputs of a run to a dashboard: metadata, loss curves, tables and final numbers."""

from collections.abc import Mapping, Sequence, Set
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from tfmq_exp.cli.run_info import RunInfo
from tfmq_exp.loggers.base import Logger, Points, Rows, RunMetadata
from tfmq_exp.report.records import ScoreRecord


def run_metadata(cfg: DictConfig, info: RunInfo, environment: Mapping[str, Any]) -> RunMetadata:
    """Name, group, tags and settings of a run."""
    settings: Any = OmegaConf.to_container(cfg, resolve=True)
    return RunMetadata(
        folder=info.folder,
        name=info.name,
        group=sweep_name(info.folder, Path(cfg.paths.outputs)) if info.sweep else None,
        kind=cfg.method.name,
        tags=(cfg.model.name, cfg.quant.name),
        choices=info.choices,
        settings={**settings, "environment": dict(environment)},
    )


def sweep_name(folder: Path, outputs: Path) -> str:
    """Common name of a sweep's runs: the folder that holds theirs, with its path below `outputs/sweeps` if it is there."""
    sweep, home = folder.resolve().parent, (outputs / "sweeps").resolve()
    return "-".join(sweep.relative_to(home).parts) if home in sweep.parents else sweep.name


def log_losses(logger: Logger, rows: Rows, shown: Set[str]) -> None:
    """Log the loss curves that the logger has not got while they grew: those of units that were learned before."""
    for row in rows:
        unit = f"{row['phase']}/{row['unit']}"
        if unit not in shown:
            logger.log_loss(unit, row["iteration"], row["loss"])


def points(rows: Rows, axis: str) -> Points:
    """Numeric columns of a table as curves over one column; sampling step and timestep are axes, no curves."""
    axes = ("step", "t")
    return [
        (row[axis], {key: value for key, value in row.items() if key not in axes and isinstance(value, int | float)})
        for row in rows
    ]


def score_summary(records: Sequence[ScoreRecord]) -> dict[str, Any]:
    """Scores, errors and costs under the names that they have on a dashboard.

    Args:
        records: of the float network, the simulation, and the same executed by an engine, if one does.
    """
    original, quantized, *deployed = records
    cost = {key: value for key, value in quantized.cost.items() if isinstance(value, int | float)}
    named = {
        "float_scores": original.scores,
        "scores": quantized.scores,
        "errors": quantized.errors,
        "cost": {**cost, "weights_bytes": quantized.weights_bytes},
        **{f"{record.choices['engine']}_scores": record.scores for record in deployed},
    }
    return {f"{name}/{key}": value for name, values in named.items() for key, value in values.items()}

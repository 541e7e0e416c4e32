"""What a run writes as rows, and what it tells its mirror: who it is, and what its curves and numbers are called there."""

import csv
from collections.abc import Mapping, Sequence, Set
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from tfmq_exp.core.files import write_atomically
from tfmq_exp.loggers.base import Logger, Points, Rows, RunMetadata
from tfmq_exp.report.records import ScoreRecord


def write_csv(path: Path, rows: Rows) -> None:
    """Rows with the same keys, as CSV."""

    def write(target: Path) -> None:
        with target.open("w", newline="", encoding="utf-8", errors="backslashreplace") as file:
            writer = csv.DictWriter(file, fieldnames=list(rows[0]) if rows else [])
            writer.writeheader()
            writer.writerows(rows)

    write_atomically(path, write)


def run_card(cfg: DictConfig, folder: Path, environment: Mapping[str, Any]) -> RunMetadata:
    """The run as Hydra started it."""
    hydra = HydraConfig.get()
    chosen = {group: file for group, file in hydra.runtime.choices.items() if not group.startswith("hydra/")}
    return RunMetadata(
        folder=folder,
        name=folder.name,
        group=sweep_name(folder, Path(cfg.paths.outputs)) if hydra.mode == RunMode.MULTIRUN else None,
        kind=cfg.method.name,
        tags=(cfg.model.name, cfg.quant.name),
        choices={group: str(file) for group, file in sorted(chosen.items()) if file is not None},
        settings={**_plain(cfg), "environment": dict(environment)},
    )


def _plain(cfg: DictConfig) -> dict[str, Any]:
    return {str(key): value for key, value in dict(OmegaConf.to_container(cfg, resolve=True)).items()}  # type: ignore[arg-type]


def sweep_name(folder: Path, outputs: Path) -> str:
    """What the runs of a sweep share: the folder that holds theirs, named from `outputs/sweeps` on where it is there."""
    sweep, home = folder.resolve().parent, (outputs / "sweeps").resolve()
    return "-".join(sweep.relative_to(home).parts) if home in sweep.parents else sweep.name


def show_losses(mirror: Logger, rows: Rows, already: Set[str]) -> None:
    """The loss curves that the mirror has not seen grow: of units that this run has found learned."""
    for row in rows:
        unit = f"{row['phase']}/{row['unit']}"
        if unit not in already:
            mirror.loss(unit, row["iteration"], row["loss"])


def points(rows: Rows, axis: str) -> Points:
    """The columns that hold numbers, along another one; sampling step and timestep are no values but places."""
    places = ("step", "t")
    return [
        (row[axis], {key: value for key, value in row.items() if key not in places and isinstance(value, int | float)})
        for row in rows
    ]


def stage_summary(name: str, hit: Mapping[str, Any]) -> dict[str, Any]:
    """One stage: whether it was computed, its seconds, those that it took when it was made, and the peak memory by then."""
    stage = name.replace(" ", "_")
    return {f"stages/{stage}/{key}": hit[key] for key in ("computed", "seconds", "took", "peak_mib")}


def score_summary(records: Sequence[ScoreRecord]) -> dict[str, Any]:
    """Scores of the float and of the quantized network, errors between them, and what it cost, under names that say so.

    Args:
        records: float, simulated, and after them the same as an engine executes it, if one does.
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

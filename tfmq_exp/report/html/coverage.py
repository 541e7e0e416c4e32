"""Cells of the grid of models, bits, methods and seeds that have no run."""

import itertools
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from tfmq_exp.report.comparability import group_by
from tfmq_exp.report.html.grouping import method_label
from tfmq_exp.report.html.run_reader import Run
from tfmq_exp.report.tables import FLOAT, bits_order, engine_of

AXES = ("model", "quant", "method", "seed")


class Cell(NamedTuple):
    """A place in the grid."""

    model: str
    bits: str
    method: str
    seed: str

    def order(self) -> tuple[Any, ...]:
        """Sort key: more bits first, seeds by their number."""
        seed = int(self.seed) if self.seed.isdecimal() else -1
        return self.model, bits_order(self.bits), self.bits, self.method, seed, self.seed


def missing_seeds(runs: Sequence[Run]) -> dict[tuple[str, str, str], list[str]]:
    """Cells of each model's grid without any run, finished or not: seeds by model, bits and method.

    The grid is spanned by the runs, and by the values that their sweeps were given.
    """
    present = {cell for run in runs for cell in _cells(run)}
    configured = {_configured(run) for run in runs if run.config and run.state != "planned"}  # without changed choices
    missing = sorted((_grid(present) - present) | (_swept(runs) - configured), key=Cell.order)
    return {key: [cell.seed for cell in cells] for key, cells in group_by(missing, lambda cell: cell[:3]).items()}


def _cells(run: Run) -> list[Cell]:
    """The cells of a run; a file of saved records has many. A model on an engine has no cell besides its simulation's."""
    own = [record for record in run.records if record.method != FLOAT and not engine_of(record)]
    if own:
        return [Cell(record.model, record.quant, method_label(record), str(record.seed)) for record in own]
    return [_configured(run)] if run.config and run.state != "planned" else []


def _configured(run: Run) -> Cell:
    return Cell(*map(run.configured, AXES[:3]), seed=str(run.config.get("seed", "?")))


def _grid(present: Iterable[Cell]) -> set[Cell]:
    """Per model all combinations of its bits, methods and seeds."""
    models = group_by(present, lambda cell: cell.model)
    return {
        Cell(*each)
        for cells in models.values()
        for each in itertools.product(*({cell[axis] for cell in cells} for axis in range(len(AXES))))
    }


def _swept(runs: Sequence[Run]) -> set[Cell]:
    """Cells of the sweeps of these runs: plain lists of values in the `multirun.yaml` beside their folders."""
    found: set[Cell] = set()
    for sweep, members in group_by([run for run in runs if not run.saved], lambda run: run.folder.parent).items():
        lists = _swept_values(sweep / "multirun.yaml")
        # names of cells with other choices are not known before they ran
        if lists and members[0].config and not lists.keys() - {*AXES, "engine"}:
            own = dict(zip(AXES, _configured(members[0]), strict=True))
            found |= {Cell(*each) for each in itertools.product(*(lists.get(axis, [own[axis]]) for axis in AXES))}
    return found


def _swept_values(path: Path) -> Mapping[str, list[str]]:
    """The keys with several values, of the command line and the configuration of a sweep."""
    try:
        hydra = yaml.safe_load(path.read_text(encoding="utf-8"))["hydra"]
        given = {str(key): str(value) for key, value in ((hydra.get("sweeper") or {}).get("params") or {}).items()}
        given |= dict(text.split("=", 1) for text in hydra["overrides"]["task"] if "=" in text)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, yaml.YAMLError):
        return {}
    plain = {key: value for key, value in given.items() if not set("()[]{}*\"'") & set(value)}
    return {key: [part.strip() for part in value.split(",")] for key, value in plain.items() if "," in value}

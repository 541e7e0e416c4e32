"""What is not there: jobs without an end, cells of the grid without a run, files that cannot be read."""

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from tfmq_exp.report.html.runs import Run
from tfmq_exp.report.html.ways import FLOAT, named
from tfmq_exp.report.tables import bits_order, engine_of

AXES = ("model", "quant", "method", "seed")
Cell = tuple[str, str, str, str]  # model, bits, method, seed


@dataclass(frozen=True)
class Gap:
    """Seeds of one way that no run is of."""

    model: str
    bits: str
    method: str
    seeds: tuple[str, ...]


def cells(run: Run) -> list[Cell]:
    """Where a run stands in the grid; a file of saved records stands in many places. An engine is no cell beside its simulation."""
    own = [r for r in run.records if r.method != FLOAT and not engine_of(r)]
    if own:
        return [(record.model, record.quant, named(record), str(record.seed)) for record in own]
    return [_configured(run)] if run.config and run.state != "planned" else []


def _configured(run: Run) -> Cell:
    return run.choice("model"), run.choice("quant"), run.choice("method"), str(run.config.get("seed", "?"))


def gaps(runs: Sequence[Run]) -> list[Gap]:
    """Cells of each model's grid of methods, bits and seeds without any run, finished or not.

    The grid is what the runs span, and what the sweeps that they belong to were asked for.
    """
    present = {cell for run in runs for cell in cells(run)}
    configured = {
        _configured(run) for run in runs if run.config and run.state != "planned"
    }  # names without the choices that were changed
    absent: dict[tuple[str, str, str], list[str]] = {}
    for model, bits, method, seed in sorted((_grid(present) - present) | (planned(runs) - configured), key=_order):
        absent.setdefault((model, bits, method), []).append(seed)
    return [Gap(*where, tuple(seeds)) for where, seeds in absent.items()]


def _order(cell: Cell) -> tuple[Any, ...]:
    model, bits, method, seed = cell
    return model, bits_order(bits), bits, method, int(seed) if seed.isdecimal() else -1, seed


def _grid(present: Iterable[Cell]) -> set[Cell]:
    """Per model all combinations of what is there."""
    models: dict[str, list[Cell]] = {}
    for cell in present:
        models.setdefault(cell[0], []).append(cell)
    return {
        (model, *rest)
        for model, some in models.items()
        for rest in itertools.product({bits for _, bits, *_ in some}, {m for _, _, m, _ in some}, {c[3] for c in some})
    }


def planned(runs: Sequence[Run]) -> set[Cell]:
    """Cells that sweeps of these runs were asked for: plain lists of values in the `multirun.yaml` beside them."""
    found: set[Cell] = set()
    for sweep in dict.fromkeys(run.folder.parent for run in runs if not run.saved):
        first = next(run for run in runs if run.folder.parent == sweep)
        lists = _asked(sweep / "multirun.yaml")
        if not lists or not first.config:
            continue
        own = {axis: first.choice(axis) for axis in AXES[:3]} | {"seed": str(first.config.get("seed", "?"))}
        axes = {axis: lists.get(axis, [own[axis]]) for axis in AXES}
        others = lists.keys() - {
            *AXES,
            "engine",
        }  # lists of other choices: what a cell is called is not known before it ran
        if not others:
            found |= set(itertools.product(axes["model"], axes["quant"], axes["method"], axes["seed"]))
    return found


def _asked(path: Path) -> Mapping[str, list[str]]:
    """The keys that a sweep gave several values to, from its command line and its configuration."""
    try:
        hydra = yaml.safe_load(path.read_text(encoding="utf-8"))["hydra"]
        given = {str(key): str(value) for key, value in ((hydra.get("sweeper") or {}).get("params") or {}).items()}
        given |= dict(text.split("=", 1) for text in hydra["overrides"]["task"] if "=" in text)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, yaml.YAMLError):
        return {}
    plain = {key: value for key, value in given.items() if not set("()[]{}*\"'") & set(value)}
    return {key: [part.strip() for part in value.split(",")] for key, value in plain.items() if "," in value}

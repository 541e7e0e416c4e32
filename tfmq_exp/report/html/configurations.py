"""Configurations of runs: keys in which they differ, and cells of the grid that they span which have no run."""

import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from tfmq_exp.report.comparability import FLOAT, bits_order, engine_of, flatten, group_by, label
from tfmq_exp.report.html.run_reader import Run

MAX_VARIANTS = 24  # in one table
PACKAGE = "tfmq_exp."  # in which every `_target_` of this project is
DERIVED = ("name", "paths.")  # keys that follow from others, or are of one machine
AXES = ("model", "quant", "method", "seed")
Cell = tuple[str, ...]  # of the grid of `AXES`


def config_diffs(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """The keys that differ within every model that has several runs, for the page.

    A variant (bits and method) has a column, which its seeds share; a row has the keys that differ alike, and their values in
    every column; `shared` counts the keys that are the same in all.
    """
    models = group_by([run for run in runs if run.config], lambda run: run.configured("model"))
    return [{"model": model, **_diff(same)} for model, same in models.items() if len(same) > 1]


def _diff(runs: Sequence[Run]) -> dict[str, Any]:
    variants: dict[str, list[dict[str, str]]] = {}
    for run in runs:
        leaves = flatten(run.config, ".").items()
        texts = {key: value if isinstance(value, str) else json.dumps(value, default=str) for key, value in leaves}
        variants.setdefault(f"{run.configured('quant')} {run.configured('method')}", []).append(texts)
    configs = list(itertools.chain(*variants.values()))
    keys = dict.fromkeys(key for config in configs for key in config if not key.startswith(DERIVED))
    differing = [key for key in keys if len({config.get(key) for config in configs}) > 1]
    shown = list(variants)[:MAX_VARIANTS]

    def values(key: str) -> tuple[str, ...]:
        every = ((config.get(key, "–").removeprefix(PACKAGE) for config in variants[variant]) for variant in shown)
        return tuple(", ".join(dict.fromkeys(texts)) for texts in every)

    rows = [(alike, texts) for texts, alike in group_by(differing, values).items()]
    numbers = {"left_out": len(variants) - len(shown), "shared": len(keys) - len(differing)}
    return {"variants": shown, "rows": rows, **numbers}


def missing_seeds(runs: Sequence[Run]) -> dict[Cell, list[str]]:
    """Cells of each model's grid without any run, finished or not: seeds by model, bits and method.

    The grid is spanned by the runs, and by the values that their sweeps were given: plain lists in the `multirun.yaml` beside
    their folders.
    """
    configured = {_configured(run) for run in runs if run.config and run.state != "planned"}  # without changed choices
    present: set[Cell] = set()
    for run in runs:  # a file of saved records has many; a model on an engine has no cell besides its simulation's
        own = [record for record in run.records if record.method != FLOAT and not engine_of(record)]
        present |= {(record.model, record.quant, label(record, "method"), str(record.seed)) for record in own}
        if not own and run.config and run.state != "planned":
            present.add(_configured(run))
    missing: set[Cell] = set()
    for cells in group_by(present, lambda cell: cell[0]).values():
        missing |= set(itertools.product(*map(set, zip(*cells, strict=True)))) - present
    for sweep, members in group_by([run for run in runs if not run.saved], lambda run: run.folder.parent).items():
        lists = _swept_values(sweep / "multirun.yaml")
        # names of cells with other choices are not known before they ran
        if lists and members[0].config and not lists.keys() - {*AXES, "engine"}:
            own = zip(AXES, _configured(members[0]), strict=True)
            missing |= set(itertools.product(*(lists.get(axis, [value]) for axis, value in own))) - configured

    def order(cell: Cell) -> tuple[Any, ...]:
        model, bits, method, seed = cell
        return model, bits_order(bits), bits, method, int(seed) if seed.isdecimal() else -1, seed

    groups = group_by(sorted(missing, key=order), lambda cell: cell[:3])
    return {key: [cell[3] for cell in cells] for key, cells in groups.items()}


def _configured(run: Run) -> Cell:
    model, quant, method = map(run.configured, AXES[:3])
    return model, quant, method, str(run.config.get("seed", "?"))


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

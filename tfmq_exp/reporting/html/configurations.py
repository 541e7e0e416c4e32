"""Configurations of runs: in full, and the keys in which they differ."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from tfmq_exp.report.html.runs import Run

COLUMNS = 24  # ways in one table of differences
PACKAGE = "tfmq_exp."  # in which every `_target_` of this project is
SAID = ("name", "paths.")  # keys that follow from others, or are of one machine


@dataclass(frozen=True)
class Differences:
    """Keys that differ between the runs of one model.

    Args:
        ways: bits and method, a column each; seeds of one way share it.
        rows: keys that differ alike, and the values in every column; several where the seeds differ.
        left_out: further ways that did not fit.
        shared: how many keys are the same in all.
    """

    model: str
    ways: tuple[str, ...]
    rows: tuple[tuple[tuple[str, ...], tuple[str, ...]], ...]
    left_out: int
    shared: int


def flat(config: Any, above: str = "") -> Iterator[tuple[str, str]]:
    """Leaves of nested mappings by their dotted keys, as text."""
    if isinstance(config, Mapping) and config:
        for key, value in config.items():
            yield from flat(value, f"{above}.{key}" if above else str(key))
    else:
        yield above, config if isinstance(config, str) else json.dumps(config, default=str)


def full(config: Mapping[str, Any]) -> str:
    """A configuration as YAML; empty where there is none."""
    return yaml.safe_dump(dict(config), sort_keys=False, allow_unicode=True, width=110) if config else ""


def differences(runs: Sequence[Run]) -> list[Differences]:
    """What differs, model by model."""
    models: dict[str, dict[str, list[dict[str, str]]]] = {}
    for run in runs:
        if run.config:
            way = f"{run.choice('quant')} {run.choice('method')}"
            models.setdefault(run.choice("model"), {}).setdefault(way, []).append(dict(flat(run.config)))
    return [_differences(model, ways) for model, ways in models.items() if sum(map(len, ways.values())) > 1]


def _differences(model: str, ways: Mapping[str, Sequence[Mapping[str, str]]]) -> Differences:
    everyone = [config for configs in ways.values() for config in configs]
    names = dict.fromkeys(key for config in everyone for key in config if not key.startswith(SAID))
    differing = [name for name in names if len({config.get(name) for config in everyone}) > 1]
    shown = tuple(ways)[:COLUMNS]
    alike: dict[tuple[str, ...], list[str]] = {}
    for name in differing:
        alike.setdefault(tuple(_values(ways[way], name) for way in shown), []).append(name)
    rows = tuple((tuple(keys), values) for values, keys in alike.items())
    return Differences(model, shown, rows, len(ways) - len(shown), len(names) - len(differing))


def _values(configs: Sequence[Mapping[str, str]], name: str) -> str:
    found = dict.fromkeys(config.get(name, "–").removeprefix(PACKAGE) for config in configs)
    return ", ".join(found)

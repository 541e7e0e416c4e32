"""The keys in which configurations of runs differ."""

import json
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from tfmq_exp.report.comparability import flatten, group_by
from tfmq_exp.report.html.run_reader import Run

MAX_VARIANTS = 24  # in one table
PACKAGE = "tfmq_exp."  # in which every `_target_` of this project is
DERIVED = ("name", "paths.")  # keys that follow from others, or are of one machine


class ConfigDiff(NamedTuple):
    """Keys that differ between the runs of one model.

    Args:
        variants: bits and method, a column each; seeds of one variant share it.
        rows: keys that differ alike, and the values in every column; several where the seeds differ.
        left_out: further variants that did not fit.
        shared: how many keys are the same in all.
    """

    model: str
    variants: tuple[str, ...]
    rows: tuple[tuple[tuple[str, ...], tuple[str, ...]], ...]
    left_out: int
    shared: int


def config_diffs(runs: Sequence[Run]) -> list[ConfigDiff]:
    """The differences within every model that has several runs."""
    models = group_by([run for run in runs if run.config], lambda run: run.configured("model"))
    return [_diff(model, same) for model, same in models.items() if len(same) > 1]


def _diff(model: str, runs: Sequence[Run]) -> ConfigDiff:
    variants: dict[str, list[dict[str, str]]] = {}
    for run in runs:
        name = f"{run.configured('quant')} {run.configured('method')}"
        leaves = flatten(run.config, ".").items()
        texts = {key: value if isinstance(value, str) else json.dumps(value, default=str) for key, value in leaves}
        variants.setdefault(name, []).append(texts)
    configs = [config for group in variants.values() for config in group]
    keys = dict.fromkeys(key for config in configs for key in config if not key.startswith(DERIVED))
    differing = [key for key in keys if len({config.get(key) for config in configs}) > 1]
    shown = tuple(variants)[:MAX_VARIANTS]
    alike = group_by(differing, lambda key: tuple(_values(variants[variant], key) for variant in shown))
    rows = tuple((tuple(same), values) for values, same in alike.items())
    return ConfigDiff(model, shown, rows, len(variants) - len(shown), len(keys) - len(differing))


def _values(configs: Sequence[Mapping[str, str]], key: str) -> str:
    return ", ".join(dict.fromkeys(config.get(key, "–").removeprefix(PACKAGE) for config in configs))

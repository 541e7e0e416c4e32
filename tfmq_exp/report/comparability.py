"""Grouping of score records: comparable ones, and seeds of one setting, which alone are averaged."""

import json
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

from tfmq_exp.report.records import ScoreRecord

EFFORT = ("weight_samples", "weight_iterations", "activation_samples", "activation_iterations")
EXECUTED = "layers_executed"  # a result of an engine, no setting
HASH_DIGITS = 8  # shown
T = TypeVar("T")
K = TypeVar("K", bound=Hashable)


def group_by(items: Iterable[T], key: Callable[[T], K]) -> dict[K, list[T]]:
    """Items by their key, in the order in which keys and items come."""
    groups: dict[K, list[T]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return groups


def flatten(node: Mapping[str, Any], separator: str) -> dict[str, Any]:
    """Nested mappings as one, their keys joined."""
    found: dict[str, Any] = {}
    for key, value in node.items():
        inner = flatten(value, separator) if isinstance(value, Mapping) else {}
        found |= {f"{key}{separator}{name}": leaf for name, leaf in inner.items()} or {str(key): value}
    return found


def comparison_key(record: ScoreRecord) -> str:
    """The same text for records whose numbers can be compared: same network, protocol, evaluator and reference."""
    return json.dumps([record.model, record.protocol, record.evaluator], sort_keys=True, default=str)


def setting(record: ScoreRecord) -> dict[str, Any]:
    """Values that all seeds of one experiment share besides its name: effort, coverage, and the hash of all settings."""
    effort = {name: record.cost[name] for name in EFFORT if name in record.cost}
    engine = record.quantized.get("engine")
    executed = {f"engine {key}": value for key, value in engine.items()} if isinstance(engine, Mapping) else {}
    plain = {k: v for k, v in record.quantized.items() if not isinstance(v, list | Mapping) and k != EXECUTED}
    return {**effort, **plain, **executed, **({"settings": record.settings["hash"]} if record.settings else {})}


def setting_key(record: ScoreRecord) -> str:
    """The setting as text."""
    return json.dumps(setting(record), sort_keys=True, default=str)


def differing_names(mappings: Sequence[Mapping[str, Any]]) -> list[str]:
    """Names whose values are not the same in all; a missing value differs from every other."""
    names = dict.fromkeys(name for each in mappings for name in each)
    return [name for name in names if len({json.dumps(each.get(name), default=str) for each in mappings}) > 1]


def describe(values: Mapping[str, Any], names: Sequence[str]) -> str:
    """Some values in words, hashes cut short."""
    return ", ".join(f"{name.replace('_', ' ')} {_short(values.get(name, 'not noted'))}" for name in names)


def _short(value: Any) -> str:
    text = str(value)
    return text[:HASH_DIGITS] if len(text) == 64 and set(text) <= set("0123456789abcdef") else text


def distinctions(records: Sequence[ScoreRecord], titles: Sequence[str]) -> list[str]:
    """Values of protocol and evaluator that differ between tables with the same title.

    Args:
        records: one of each table.
        titles: of the tables.

    Returns:
        words for every table, empty where its title is unique.
    """
    flat = [flatten(r.protocol, " ") | flatten({"evaluator": r.evaluator}, " ") for r in records]
    groups = group_by(zip(titles, flat, strict=True), lambda pair: pair[0])
    names = {title: differing_names([values for _, values in group]) for title, group in groups.items()}
    return [describe(values, names[title]) for title, values in zip(titles, flat, strict=True)]


def one_per_seed(records: Sequence[ScoreRecord]) -> tuple[list[ScoreRecord], int]:
    """The last record of every seed, in the order of seeds, and how many with other numbers are left out.

    A repeated run is no further seed: a mean over both would count it twice.
    """
    last = {record.seed: record for record in records}
    numbers = {(r.seed, json.dumps([r.scores, r.errors], sort_keys=True)) for r in records}
    return [last[seed] for seed in sorted(last)], len(numbers) - len(last)

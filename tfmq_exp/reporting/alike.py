"""What makes two records comparable, and when they are seeds of one setting: nothing else is ever averaged."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from tfmq_exp.report.records import ScoreRecord

EFFORT = ("weight_samples", "weight_iterations", "activation_samples", "activation_iterations")
EXECUTED = "layers_executed"  # what an engine found it could do, which is no setting
SHOWN = 8  # digits of a hash


def comparable(record: ScoreRecord) -> str:
    """The same text for records whose numbers can be compared: one network, one protocol, one evaluator and reference."""
    return json.dumps([record.model, record.protocol, record.evaluator], sort_keys=True, default=str)


def setting(record: ScoreRecord) -> dict[str, Any]:
    """What all seeds of one way of quantizing share, beside its name: effort, coverage, and the hash of all settings."""
    effort = {name: record.cost[name] for name in EFFORT if name in record.cost}
    engine = record.quantized.get("engine")
    executed = {f"engine {key}": value for key, value in engine.items()} if isinstance(engine, Mapping) else {}
    plain = {k: v for k, v in record.quantized.items() if not isinstance(v, list | Mapping) and k != EXECUTED}
    return {**effort, **plain, **executed, **({"settings": record.settings["hash"]} if record.settings else {})}


def differing(some: Sequence[Mapping[str, Any]]) -> list[str]:
    """Names whose values are not the same in all; one that is missing has another value than any."""
    names = dict.fromkeys(name for each in some for name in each)
    return [name for name in names if len({json.dumps(each.get(name), default=str) for each in some}) > 1]


def in_words(own: Mapping[str, Any], names: Sequence[str]) -> str:
    """Some values in words, hashes cut short."""
    return ", ".join(f"{name.replace('_', ' ')} {_short(own.get(name, 'not noted'))}" for name in names)


def _short(value: Any) -> str:
    text = str(value)
    return text[:SHOWN] if len(text) == 64 and set(text) <= set("0123456789abcdef") else text


def distinctions(records: Sequence[ScoreRecord], titles: Sequence[str]) -> list[str]:
    """Of records that stand for one table each: where titles are the same, what of protocol and evaluator is not.

    Args:
        records: one of each table.
        titles: of the tables.

    Returns:
        words for every table, empty where its title is no other's.
    """
    flat = [_flat({"": record.protocol, "evaluator": record.evaluator}) for record in records]
    found: list[str] = []
    for own, title in zip(flat, titles, strict=True):
        namesakes = [other for other, same in zip(flat, titles, strict=True) if same == title]
        found.append(in_words(own, differing(namesakes)))
    return found


def _flat(node: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one, their keys after each other."""
    found: dict[str, Any] = {}
    for key, value in node.items():
        name = f"{prefix} {key}".strip()
        found |= _flat(value, name) if isinstance(value, Mapping) else {name: value}
    return found


def one_per_seed(records: Sequence[ScoreRecord]) -> tuple[list[ScoreRecord], int]:
    """The last record of every seed, in the order of seeds, and how many others with other numbers are left out.

    A run that was repeated is no further seed: a mean over both would count it twice.
    """
    last = {record.seed: record for record in records}
    numbers = {(r.seed, json.dumps([r.scores, r.errors], sort_keys=True)) for r in records}
    return [last[seed] for seed in sorted(last)], len(numbers) - len(last)

"""Groups of score records, comparable ones and seeds of one setting, which alone are averaged; and the names of both."""

import json
import re
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

from tfmq_exp.report.records import ScoreRecord

FLOAT = "float"  # the method of records of the unquantized network
EFFORT = ("weight_samples", "weight_iterations", "activation_samples", "activation_iterations")
EXECUTED = "layers_executed"  # a result of an engine, no setting
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


def join(*words: str) -> str:
    """Words with commas between them, empty ones left out."""
    return ", ".join(filter(None, words))


def comparison_key(record: ScoreRecord) -> str:
    """The same text for records whose numbers can be compared: same network, protocol, evaluator and reference."""
    return json.dumps([record.model, record.protocol, record.evaluator], sort_keys=True, default=str)


def setting(record: ScoreRecord) -> dict[str, Any]:
    """Values that all seeds of one experiment share besides its name: effort, coverage, and the hash of all settings."""
    quantized, engine = record.quantized, record.quantized.get("engine")
    return {
        **{name: record.cost[name] for name in EFFORT if name in record.cost},
        **{k: v for k, v in quantized.items() if not isinstance(v, list | Mapping) and k != EXECUTED},
        **({f"engine {key}": value for key, value in engine.items()} if isinstance(engine, Mapping) else {}),
        **({"settings": record.settings["hash"]} if record.settings else {}),
    }


def setting_key(record: ScoreRecord) -> str:
    """The setting as text."""
    return json.dumps(setting(record), sort_keys=True, default=str)


def differing_names(mappings: Sequence[Mapping[str, Any]]) -> list[str]:
    """Names whose values are not the same in all; a missing value differs from every other."""
    names = dict.fromkeys(name for each in mappings for name in each)
    return [name for name in names if len({json.dumps(each.get(name), default=str) for each in mappings}) > 1]


def describe(values: Mapping[str, Any], names: Sequence[str]) -> str:
    """Some values in words, of hashes the first eight digits."""
    texts = {name: str(values.get(name, "not noted")) for name in names}
    shown = {name: text[:8] if re.fullmatch("[0-9a-f]{64}", text) else text for name, text in texts.items()}
    return ", ".join(f"{name.replace('_', ' ')} {text}" for name, text in shown.items())


def distinctions(records: Sequence[ScoreRecord], titles: Sequence[str]) -> list[str]:
    """Values of protocol and evaluator that differ between tables with the same title; empty where a title is unique."""
    flat = [flatten(r.protocol, " ") | flatten({"evaluator": r.evaluator}, " ") for r in records]
    groups = group_by(zip(titles, flat, strict=True), lambda pair: pair[0])
    names = {title: differing_names([values for _, values in group]) for title, group in groups.items()}
    return [describe(values, names[title]) for title, values in zip(titles, flat, strict=True)]


def one_per_seed(records: Sequence[ScoreRecord]) -> tuple[list[ScoreRecord], str]:
    """The last record of every seed in order (a repeated run is no further seed), and a note on those left out."""
    last = {record.seed: record for record in records}
    more = len({(r.seed, json.dumps([r.scores, r.errors], sort_keys=True)) for r in records}) - len(last)
    note = f" ({more} more run{'s' if more > 1 else ''} of them left out)" if more else ""
    return [last[seed] for seed in sorted(last)], note


def bits_order(quant: str) -> tuple[int, ...]:
    """Sort key of names like w4a8: more bits first."""
    return tuple(-int(digits) for digits in re.findall(r"\d+", quant))


def changed_choices(record: ScoreRecord) -> dict[str, str]:
    """Choices that were changed in a method, without those that its name says: S_N says its N."""
    return {key: value for key, value in sorted(record.choices.items()) if record.method != f"s{value}"}


def engine_of(record: ScoreRecord) -> str:
    """The engine that executed it; empty for simulated quantization, and for the float network."""
    return record.choices.get("engine", "")


def label(record: ScoreRecord, group: str = "") -> str:
    """A method with what was changed in it and its engine; the name of `group` is left away before its choices."""
    choices, engine = changed_choices(record), engine_of(record)
    inside = [key for key in choices if key.partition(".")[0] != "engine"]
    words = [f"{key.removeprefix(group).lstrip('./')}={choices[key]}" for key in inside]
    words += [f"executed by {engine}"] if engine else []
    words += [f"{key}={choices[key]}" for key in choices if key.startswith("engine.")]
    return f"{record.method} ({', '.join(words)})" if words else record.method


def names(records: Sequence[ScoreRecord]) -> list[str]:
    """The label of each record, with its setting where several settings share the label."""
    groups = group_by(records, lambda record: (record.quant, label(record)))
    variants = {key: [same[0] for same in group_by(group, setting_key).values()] for key, group in groups.items()}
    words = [_setting_words(record, variants[record.quant, label(record)]) for record in records]
    return [f"{label(r)} [{text}]" if text else label(r) for r, text in zip(records, words, strict=True)]


def _setting_words(record: ScoreRecord, others: Sequence[ScoreRecord]) -> str:
    """Text that distinguishes a record's setting from others: changed settings, a hash, or effort and coverage."""
    if len(others) < 2:
        return ""
    named = {other.settings["hash"]: other.settings["named"] for other in others if other.settings}
    own = record.settings.get("named", "") if record.settings else "settings not noted"
    if record.settings and (not own or list(named.values()).count(own) > 1):
        own = record.settings["hash"]
    count = len(named) + any(not other.settings for other in others)
    differing = [name for name in differing_names([setting(other) for other in others]) if name != "settings"]
    return join(own if count > 1 else "", describe(setting(record), differing) if count < len(others) else "")


def sampling_title(record: ScoreRecord) -> str:
    """Sampler, guidance and number of images in a line; what a record does not say is left out."""
    protocol, sampler = record.protocol, record.protocol.get("sampler", {})
    sampler = sampler.get("sampler", sampler)  # of a pipeline's, the one inside
    kind, steps = sampler.get("kind", sampler.get("class", "")), sampler.get("num_inference_steps")
    return join(
        kind if steps is None else f"{kind} {steps} steps",
        f"eta {sampler['eta']}" if "eta" in sampler else "",
        f"guidance {protocol['guidance']}" if protocol.get("guidance", 1) != 1 else "",
        f"{protocol['images']} images" if "images" in protocol else "",
    )


def scored_by(record: ScoreRecord) -> str:
    """Evaluator and reference."""
    return " against ".join(filter(None, (record.evaluator["name"], record.evaluator.get("reference"))))

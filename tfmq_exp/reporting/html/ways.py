"""What may stand together: runs of one model, protocol and evaluator, and in them the ways of quantizing."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tfmq_exp.reporting.comparison import EFFORT
from tfmq_exp.reporting.html.runs import Run
from tfmq_exp.reporting.records import ScoreRecord
from tfmq_exp.reporting.tables import bits_order

FLOAT = "float"


@dataclass(frozen=True)
class Member:
    """A record and the run that made it."""

    record: ScoreRecord
    run: Run


@dataclass(frozen=True)
class Way:
    """One way of quantizing: a line of a table, a curve of a chart. `members` has one for every seed."""

    bits: str
    label: str
    members: tuple[Member, ...]
    left_out: int = 0  # other runs with a seed that is there already

    @property
    def is_float(self) -> bool:
        """Whether it is the network before quantization."""
        return self.members[0].record.method == FLOAT

    @property
    def records(self) -> tuple[ScoreRecord, ...]:
        """The record of every seed."""
        return tuple(member.record for member in self.members)


@dataclass(frozen=True)
class Group:
    """Ways that can be compared: same model, protocol, evaluator. The float network comes first, then more bits."""

    model: str
    protocol: Mapping[str, Any]
    evaluator: Mapping[str, Any]
    ways: tuple[Way, ...]

    @property
    def title(self) -> str:
        """How its numbers were made, in a line."""
        sampler = self.protocol.get("sampler", {})
        steps = [str(sampler.get("class", "")), f"{sampler['steps']} steps" if "steps" in sampler else ""]
        eta = f"eta {sampler['eta']:g}" if isinstance(sampler.get("eta"), int | float) else ""
        guidance = self.protocol.get("guidance", 1)
        guided = f"guidance {guidance:g}" if isinstance(guidance, int | float) and guidance != 1 else ""
        images = f"{self.protocol['images']} images" if "images" in self.protocol else ""
        return ", ".join(part for part in (" ".join(filter(None, steps)), eta, guided, images) if part)

    @property
    def judge(self) -> str:
        """Who scores, against what."""
        reference = self.evaluator.get("reference")
        return f"{self.evaluator['name']} against {reference}" if reference else str(self.evaluator["name"])

    @property
    def bits(self) -> list[str]:
        """Bits of the quantized ways, more first."""
        return list(dict.fromkeys(way.bits for way in self.ways if not way.is_float))

    @property
    def quantized(self) -> list[Way]:
        """The ways that quantize."""
        return [way for way in self.ways if not way.is_float]


def named(record: ScoreRecord) -> str:
    """A method with the choices that were changed in it."""
    choices = {key.removeprefix("method").lstrip("./"): value for key, value in sorted(record.choices.items())}
    extra = ", ".join(f"{key}={value}" for key, value in choices.items())
    return f"{record.method} ({extra})" if extra else record.method


def settings(record: ScoreRecord) -> dict[str, Any]:
    """What all seeds of one way share, beside its name: effort and coverage."""
    effort = {name: record.cost[name] for name in EFFORT if name in record.cost}
    return {**effort, **{key: value for key, value in record.quantized.items() if not isinstance(value, list)}}


def groups(runs: Sequence[Run]) -> list[Group]:
    """Groups in the order in which their first runs come."""
    members: dict[str, list[Member]] = {}
    for run in runs:
        for record in run.records:
            key = json.dumps([record.model, record.protocol, record.evaluator], sort_keys=True, default=str)
            members.setdefault(key, []).append(Member(record, run))
    return [_group(together) for together in members.values()]


def _group(members: Sequence[Member]) -> Group:
    first = members[0].record
    ways = sorted(_ways(members), key=lambda way: (not way.is_float, bits_order(way.bits), way.bits, way.label))
    return Group(first.model, first.protocol, first.evaluator, tuple(ways))


def _ways(members: Sequence[Member]) -> Iterator[Way]:
    """Members by bits and name; where one name has several settings, what differs is part of the label."""
    together: dict[tuple[str, str], dict[str, list[Member]]] = {}
    for member in members:
        variants = together.setdefault((member.record.quant, named(member.record)), {})
        variants.setdefault(json.dumps(settings(member.record), sort_keys=True), []).append(member)
    for (bits, label), variants in together.items():
        shown = _differing([json.loads(text) for text in variants])
        for text, same in variants.items():
            own = json.loads(text)
            extra = ", ".join(f"{key.replace('_', ' ')} {own.get(key, 'not noted')}" for key in shown)
            made_last = sorted(
                same, key=lambda member: member.run.state != "found"
            )  # a found run has what another made
            seeds = {member.record.seed: member for member in made_last}
            repeats = len({json.dumps([m.record.seed, m.record.keys], sort_keys=True) for m in same}) - len(seeds)
            chosen = tuple(seeds[seed] for seed in sorted(seeds))
            yield Way(bits, f"{label} ({extra})" if extra else label, chosen, repeats)


def _differing(variants: Sequence[Mapping[str, Any]]) -> list[str]:
    names = dict.fromkeys(name for variant in variants for name in variant)
    return [name for name in names if len({json.dumps(variant.get(name)) for variant in variants}) > 1]

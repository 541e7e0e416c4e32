"""What may stand together: runs of one model, protocol and evaluator, and in them the ways of quantizing."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from tfmq_exp.report.comparability import comparable, differing, distinctions, in_words, setting
from tfmq_exp.report.html.runs import DEPLOYED_TRAJECTORY, Run
from tfmq_exp.report.records import ScoreRecord
from tfmq_exp.report.tables import bits_order, engine_of, label

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
    def engine(self) -> str:
        """What executed it; empty for simulated quantization."""
        return engine_of(self.members[0].record)

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
    distinction: str = ""  # from groups that would be described alike

    @property
    def title(self) -> str:
        """How its numbers were made, in a line."""
        sampler = self.protocol.get("sampler", {})
        steps = [str(sampler.get("class", "")), f"{sampler['steps']} steps" if "steps" in sampler else ""]
        eta = f"eta {sampler['eta']:g}" if isinstance(sampler.get("eta"), int | float) else ""
        guidance = self.protocol.get("guidance", 1)
        guided = f"guidance {guidance:g}" if isinstance(guidance, int | float) and guidance != 1 else ""
        images = f"{self.protocol['images']} images" if "images" in self.protocol else ""
        parts = (" ".join(filter(None, steps)), eta, guided, images, self.distinction)
        return ", ".join(part for part in parts if part)

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
    return label(record, "method")


def groups(runs: Sequence[Run]) -> list[Group]:
    """Groups in the order in which their first runs come."""
    members: dict[str, list[Member]] = {}
    for run in runs:
        for record in run.records:
            members.setdefault(comparable(record), []).append(Member(record, own_part(record, run)))
    found = [_group(together) for together in members.values()]
    records = [group.ways[0].records[0] for group in found]
    words = distinctions(records, [f"{group.model} {group.title} {group.judge}" for group in found])
    return [replace(group, distinction=text) for group, text in zip(found, words, strict=True)]


def own_part(record: ScoreRecord, run: Run) -> Run:
    """The run without what is another record's: an engine has stages and a trajectory of its own, and nothing else has them.

    An engine's stages are called as those of the simulation, and its first one is the export.
    """
    own, engines = engine_of(record), {engine for other in run.records if (engine := engine_of(other))}
    by_engine = {name: name.partition(" ")[0] for name in run.stages}
    if own:
        stages = {
            name.removeprefix(own).strip() or "export": stage
            for name, stage in run.stages.items()
            if by_engine[name] == own
        }
        tables = {"trajectory_error.csv": rows} if (rows := run.tables.get(DEPLOYED_TRAJECTORY)) else {}
    else:
        stages = {name: stage for name, stage in run.stages.items() if by_engine[name] not in engines}
        tables = {file: rows for file, rows in run.tables.items() if file != DEPLOYED_TRAJECTORY}
    return replace(run, stages=stages, tables=tables)


def _group(members: Sequence[Member]) -> Group:
    first = members[0].record
    ways = sorted(_ways(members), key=lambda way: (not way.is_float, bits_order(way.bits), way.bits, way.label))
    return Group(first.model, first.protocol, first.evaluator, tuple(ways))


def _ways(members: Sequence[Member]) -> Iterator[Way]:
    """Members by bits and name; where one name has several settings, what differs is part of the label."""
    together: dict[tuple[str, str], dict[str, list[Member]]] = {}
    for member in members:
        variants = together.setdefault((member.record.quant, named(member.record)), {})
        variants.setdefault(json.dumps(setting(member.record), sort_keys=True), []).append(member)
    for (bits, name), variants in together.items():
        shown = differing([json.loads(text) for text in variants])
        for text, same in variants.items():
            own = json.loads(text)
            extra = in_words(own, shown)
            made_last = sorted(
                same, key=lambda member: member.run.state != "found"
            )  # a found run has what another made
            seeds = {member.record.seed: member for member in made_last}
            repeats = len({_images(member.record) for member in same}) - len(seeds)
            chosen = tuple(_maker(seeds[seed], same) for seed in sorted(seeds))
            yield Way(bits, _with(name, extra), chosen, repeats)


def _images(record: ScoreRecord) -> str:
    """What tells the images of one record from those of another."""
    return json.dumps([record.seed, record.keys.get("scores", record.keys)], sort_keys=True)


def _maker(member: Member, same: Sequence[Member]) -> Member:
    """Of runs that share their images the one that made them: several engines share one simulation."""
    if "scores" not in member.record.keys:
        return member
    sharing = [other for other in same if _images(other.record) == _images(member.record)]
    return next((o for o in sharing if any(s.get("computed") is True for s in o.run.stages.values())), member)


def _with(label: str, extra: str) -> str:
    """A label with further words, all in one pair of brackets."""
    if not extra:
        return label
    return f"{label[:-1]}, {extra})" if label.endswith(")") else f"{label} ({extra})"

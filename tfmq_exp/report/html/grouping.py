"""Records that can be compared, in groups of one model, protocol and evaluator, and in them the variants of quantization."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from tfmq_exp.report.columns import Reader
from tfmq_exp.report.comparability import comparison_key, describe, differing_names, distinctions, group_by, setting_key
from tfmq_exp.report.html.run_reader import DEPLOYED_TRAJECTORY, TRAJECTORY, Rows, Run
from tfmq_exp.report.records import ScoreRecord
from tfmq_exp.report.tables import FLOAT, bits_order, engine_of, label, sampling_title, scored_by


class Member(NamedTuple):
    """A record and the run that made it."""

    record: ScoreRecord
    run: Run


@dataclass(frozen=True)
class Variant:
    """Bits, a method and its settings: a line of a table, a curve of a chart.

    Args:
        bits: such as w4a8.
        label: the method, and in brackets what was changed in it.
        members: one for every seed.
        left_out: how many other runs repeat a seed.
    """

    bits: str
    label: str
    members: tuple[Member, ...]
    left_out: int = 0

    @property
    def name(self) -> str:
        return f"{self.bits} {self.label}"

    @property
    def is_float(self) -> bool:
        return self.members[0].record.method == FLOAT

    @property
    def engine(self) -> str:
        """The engine that executed it; empty for simulated quantization."""
        return engine_of(self.members[0].record)

    @property
    def records(self) -> tuple[ScoreRecord, ...]:
        return tuple(member.record for member in self.members)

    @property
    def runs(self) -> tuple[Run, ...]:
        return tuple(member.run for member in self.members)

    def order(self) -> tuple[Any, ...]:
        """Sort key: the float network first, then more bits."""
        return not self.is_float, bits_order(self.bits), self.bits, self.label

    def values(self, read: Reader) -> list[float]:
        """The numbers of all seeds that have one."""
        return [value for record in self.records if (value := read(record)) is not None]

    def tables(self, file: str) -> list[Rows]:
        """The rows of a CSV file, of every seed that has some."""
        return [rows for run in self.runs if (rows := run.tables.get(file))]


@dataclass(frozen=True)
class Group:
    """Variants that can be compared: same model, protocol, evaluator. The float network comes first, then more bits.

    `distinction` says what differs from groups with the same title.
    """

    variants: tuple[Variant, ...]
    distinction: str = ""

    @property
    def first(self) -> ScoreRecord:
        """A record, for what all have in common."""
        return self.variants[0].records[0]

    @property
    def model(self) -> str:
        return self.first.model

    @property
    def title(self) -> str:
        """Sampling protocol of the group, in a line."""
        return ", ".join(filter(None, (sampling_title(self.first), self.distinction)))

    @property
    def quantized(self) -> list[Variant]:
        return [variant for variant in self.variants if not variant.is_float]

    @property
    def bits(self) -> list[str]:
        """Bits of the quantized variants, more first."""
        return list(dict.fromkeys(variant.bits for variant in self.quantized))

    @property
    def records(self) -> list[ScoreRecord]:
        return [record for variant in self.variants for record in variant.records]


def method_label(record: ScoreRecord) -> str:
    """A method with the choices that were changed in it."""
    return label(record, "method")


def group_runs(runs: Sequence[Run]) -> list[Group]:
    """Groups in the order in which their first runs come."""
    members = [Member(record, _own_part(record, run)) for run in runs for record in run.records]
    comparable = group_by(members, lambda member: comparison_key(member.record))
    found = [Group(tuple(sorted(_variants(same), key=Variant.order))) for same in comparable.values()]
    records = [group.first for group in found]
    words = distinctions(records, [f"{each.model} {sampling_title(each)} {scored_by(each)}" for each in records])
    return [replace(group, distinction=text) for group, text in zip(found, words, strict=True)]


def _own_part(record: ScoreRecord, run: Run) -> Run:
    """The run without stages and tables of its other records: an engine has its own stages and its own trajectory.

    An engine's stages become named as those of the simulation; its first one is the export.
    """
    own, engines = engine_of(record), {engine_of(other) for other in run.records} - {""}
    stages: dict[str, Mapping[str, Any]] = {}
    for name, stage in run.stages.items():
        prefix, _, rest = name.partition(" ")
        if own and prefix == own:
            stages[rest or "export"] = stage
        elif not own and prefix not in engines:
            stages[name] = stage
    if own:
        tables = {TRAJECTORY: rows} if (rows := run.tables.get(DEPLOYED_TRAJECTORY)) else {}
    else:
        tables = {file: rows for file, rows in run.tables.items() if file != DEPLOYED_TRAJECTORY}
    return replace(run, stages=stages, tables=tables)


def _variants(members: Sequence[Member]) -> Iterator[Variant]:
    """Members by bits and name; where one name has several settings, the label says what differs."""
    named = group_by(members, lambda member: (member.record.quant, method_label(member.record)))
    for (bits, name), same_name in named.items():
        settings = group_by(same_name, lambda member: setting_key(member.record))
        values = {key: json.loads(key) for key in settings}
        shown = differing_names(list(values.values()))
        for key, same in settings.items():
            found_first = sorted(same, key=lambda member: member.run.state != "found")  # they have what another made
            seeds = {member.record.seed: member for member in found_first}
            left_out = len({_images_key(member.record) for member in same}) - len(seeds)
            chosen = tuple(_maker(seeds[seed], same) for seed in sorted(seeds))
            yield Variant(bits, _extended(name, describe(values[key], shown)), chosen, left_out)


def _images_key(record: ScoreRecord) -> str:
    """The same text for records of the same images."""
    return json.dumps([record.seed, record.keys.get("scores", record.keys)], sort_keys=True)


def _maker(member: Member, same: Sequence[Member]) -> Member:
    """The run that made the images which several runs share: several engines share one simulation."""
    if "scores" not in member.record.keys:
        return member
    sharing = [other for other in same if _images_key(other.record) == _images_key(member.record)]
    return next((o for o in sharing if any(s.get("computed") is True for s in o.run.stages.values())), member)


def _extended(label: str, words: str) -> str:
    """A label with further words, all in one pair of brackets."""
    if not words:
        return label
    return f"{label[:-1]}, {words})" if label.endswith(")") else f"{label} ({words})"

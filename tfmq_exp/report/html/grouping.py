"""Records that can be compared, in groups of one model, protocol and evaluator, and in them the variants of quantization."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from tfmq_exp.report import comparability
from tfmq_exp.report.comparability import FLOAT, bits_order, engine_of, group_by, join, label
from tfmq_exp.report.html.run_reader import DEPLOYED_TRAJECTORY, TRAJECTORY, Rows, Run
from tfmq_exp.report.records import ScoreRecord
from tfmq_exp.report.tables import Reader

Member = tuple[ScoreRecord, Run]  # a record and the run that made it


@dataclass(frozen=True)
class Variant:
    """Bits, a method and its settings: a line of a table, a curve of a chart."""

    bits: str  # such as w4a8
    label: str  # the method, and in brackets what was changed in it
    records: Sequence[ScoreRecord]  # one for every seed
    runs: Sequence[Run]  # that made them
    left_out: int = 0  # other runs that repeat a seed

    @property
    def name(self) -> str:
        return f"{self.bits} {self.label}"

    @property
    def is_float(self) -> bool:
        return self.records[0].method == FLOAT

    @property
    def engine(self) -> str:
        """The engine that executed it; empty for simulated quantization."""
        return engine_of(self.records[0])

    def values(self, read: Reader) -> list[float]:
        """The numbers of all seeds that have one."""
        return [value for record in self.records if (value := read(record)) is not None]

    def tables(self, file: str) -> list[Rows]:
        """The rows of a CSV file, of every seed that has some."""
        return [rows for run in self.runs if (rows := run.tables.get(file))]


@dataclass(frozen=True)
class Group:
    """Variants that can be compared: same model, protocol, evaluator. The float network comes first, then more bits."""

    variants: tuple[Variant, ...]
    distinction: str = ""  # from groups with the same title

    @property
    def first(self) -> ScoreRecord:
        """A record, for what all have in common."""
        return self.variants[0].records[0]

    @property
    def title(self) -> str:
        """Sampling protocol of the group, in a line."""
        return join(comparability.sampling_title(self.first), self.distinction)

    @property
    def quantized(self) -> list[Variant]:
        return [variant for variant in self.variants if not variant.is_float]

    @property
    def bits(self) -> dict[str, list[Variant]]:
        """The quantized variants by their bits, more first."""
        return group_by(self.quantized, lambda variant: variant.bits)

    @property
    def records(self) -> list[ScoreRecord]:
        return [record for variant in self.variants for record in variant.records]


def group_runs(runs: Sequence[Run]) -> list[Group]:
    """Groups in the order in which their first runs come."""
    members = [(record, _own_part(record, run)) for run in runs for record in run.records]

    def order(variant: Variant) -> tuple[Any, ...]:
        return not variant.is_float, bits_order(variant.bits), variant.bits, variant.label

    comparable = group_by(members, lambda member: comparability.comparison_key(member[0]))
    found = [Group(tuple(sorted(_variants(same), key=order))) for same in comparable.values()]
    records = [group.first for group in found]
    words = comparability.distinctions(
        records,
        [f"{each.model} {comparability.sampling_title(each)} {comparability.scored_by(each)}" for each in records],
    )
    return [replace(group, distinction=text) for group, text in zip(found, words, strict=True)]


def _own_part(record: ScoreRecord, run: Run) -> Run:
    """The run without other records' stages and tables; an engine's are named as the simulation's, first the export."""
    own, engines = engine_of(record), {engine_of(other) for other in run.records} - {""}
    stages: dict[str, Mapping[str, Any]] = {}
    for name, stage in run.stages.items():
        prefix, _, rest = name.partition(" ")
        if own and prefix == own:
            stages[rest or "export"] = stage
        elif not own and prefix not in engines:
            stages[name] = stage
    tables = {file: rows for file, rows in run.tables.items() if not own and file != DEPLOYED_TRAJECTORY}
    if own and (rows := run.tables.get(DEPLOYED_TRAJECTORY)):
        tables = {TRAJECTORY: rows}
    return replace(run, stages=stages, tables=tables)


def _variants(members: Sequence[Member]) -> Iterator[Variant]:
    """Members by bits and name; where one name has several settings, the label says what differs."""

    def images(member: Member) -> str:
        keys = member[0].keys
        return json.dumps([member[0].seed, keys.get("scores", keys)], sort_keys=True)

    for (bits, name), same_name in group_by(members, lambda m: (m[0].quant, label(m[0], "method"))).items():
        settings = group_by(same_name, lambda member: comparability.setting_key(member[0]))
        values = {key: json.loads(key) for key in settings}
        shown = comparability.differing_names(list(values.values()))
        for key, same in settings.items():
            found_first = sorted(same, key=lambda member: member[1].state != "found")  # they have what another made
            seeds = {member[0].seed: member for member in found_first}
            sharing = group_by(same, images)  # several engines share one simulation, and the images of its run
            makers = {at: next((m for m in of if _computed(m)), None) for at, of in sharing.items()}
            chosen = [makers[images(seeds[seed])] or seeds[seed] for seed in sorted(seeds)]
            words = comparability.describe(values[key], shown)
            open_name = f"{name[:-1]}, " if name.endswith(")") else f"{name} ("
            records, runs = zip(*chosen, strict=True)
            yield Variant(bits, f"{open_name}{words})" if words else name, records, runs, len(sharing) - len(seeds))


def _computed(member: Member) -> bool:
    """Whether the run made these images."""
    record, run = member
    return "scores" in record.keys and any(stage.get("computed") is True for stage in run.stages.values())

"""A published table beside what was measured here: a difference stands only where both were made alike."""

import json
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from tfmq_exp.report.comparability import EFFORT
from tfmq_exp.report.protocol_match import QUALITY, differing, unstated
from tfmq_exp.report.published_tables import PublishedRow
from tfmq_exp.report.records import ScoreRecord
from tfmq_exp.report.tables import bits_order, changed

SCORE_ORDER = ("fid", "sfid", "is", "clip", "precision", "gpu_hours", "memory_mb", "size_mb", "latency_s", "speedup")
CHANGE = "change of "  # the published number is a difference from a baseline

# TFMQ-DM's table 5 in the choices of the preset that makes it; the baseline has the same surgery as the other cells
PARTITION, SCALES = "method/weights/partition", "method/scales"
ABLATION = {
    ("tfmq", "blockwise", "static"): "brecq",
    ("tfmq", "temporal_aware", "static"): "tiar",
    ("tfmq", "blockwise", "finite_set"): "fsc",
    ("tfmq", "temporal_aware", "finite_set"): "tfmq",
}
WHOLE = {method for (method, *_), name in ABLATION.items() if name == method}  # with all of its parts
# the method of TDQ's paper and its baseline, under training: LSQ with another source of steps
AS_PRINTED = {"lsq_tdq": "tdq", "lsq_dynamic": "dynamic"}


@dataclass(frozen=True)
class Cell:
    """One score of one model.

    Args:
        paper: what is printed; None where the table has nothing. `spread` is what stands after its plus-minus sign.
        verified: how the published number was seen; see `PublishedRow`.
        ours: the score of every seed; empty where nothing was measured.
        difference: mean of ours less the paper's, where the protocols agree.
        notes: what a reader must know of either number.
    """

    paper: float | None = None
    spread: float | None = None
    verified: str = ""
    ours: tuple[float, ...] = ()
    difference: float | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Comparison:
    """A table: columns are (model, score), lines are (bits, method, a cell for every column)."""

    paper: str
    reference: str
    table: str
    title: str
    columns: tuple[tuple[str, str], ...]
    lines: tuple[tuple[str, str, tuple[Cell, ...]], ...]
    notes: tuple[str, ...]


def _plain(text: str) -> str:
    return "".join(c for c in text.lower() if c.isalnum())


def listing(published: Sequence[PublishedRow]) -> dict[str, dict[str, str]]:
    """Titles by paper and table."""
    found: dict[str, dict[str, str]] = {}
    for row in published:
        found.setdefault(row.paper, {})[row.table] = row.title
    return found


def choose_paper(published: Sequence[PublishedRow], paper: str) -> str:
    """The name of a paper. Case, spaces and signs do not count, and the beginning of a name is enough.

    Raises:
        ValueError: no such paper, or more than one; the error names those that there are.
    """
    tables = listing(published)
    exact = [name for name in tables if _plain(name) == _plain(paper)]
    begun = [name for name in tables if _plain(paper) and _plain(name).startswith(_plain(paper))]
    names = exact or begun
    if len(names) != 1:
        problem = f"{paper!r} could be {' or '.join(names)}" if names else f"no paper {paper!r}"
        raise ValueError(f"{problem}; there are {', '.join(sorted(tables))}")
    return names[0]


def choose(published: Sequence[PublishedRow], paper: str, table: str) -> list[PublishedRow]:
    """The rows of one table, chosen as papers are.

    Raises:
        ValueError: no such paper, more than one, or no such table; the error names those that there are.
    """
    name = choose_paper(published, paper)
    if not (found := [row for row in published if row.paper == name and _plain(row.table) == _plain(table)]):
        raise ValueError(f"{name} has no table {table!r}; there are {', '.join(listing(published)[name])}")
    return found


def _numbers(row: PublishedRow) -> dict[str, float | None]:
    """What a row prints, by the name of its column."""
    scores = {name: value for name, value in row.scores.items() if name != "fid_spread"}
    return scores | {CHANGE + name: value for name, value in row.deltas.items()}


def _lines(rows: Sequence[PublishedRow]) -> Iterator[tuple[str, str, list[PublishedRow], bool]]:
    """Bits, method, rows, and whether they are a variant: rows with the same numbers stand apart, named by their notes."""
    groups: dict[tuple[str, str], list[PublishedRow]] = {}
    for row in rows:
        groups.setdefault((row.bits, row.method), []).append(row)
    for (bits, method), members in sorted(groups.items(), key=lambda item: item[0][1] != "float"):
        names = [(row.model, name) for row in members for name in _numbers(row)]
        if len(names) == len(set(names)):
            yield bits, method, members, False
            continue
        for note in dict.fromkeys(row.note for row in members):
            label = f"{method} ({note})" if note else method
            yield bits, label, [row for row in members if row.note == note], True


def published_name(record: ScoreRecord, *, ablation: bool) -> str | None:
    """The method of a published row that a record is of; None for variations that no table has.

    In an ablation a record's choices say which part of the method it has; elsewhere it may have no choices of its own.
    """
    choices = changed(record)
    if choices.keys() == {PARTITION, SCALES}:
        name = ABLATION.get((record.method, choices[PARTITION], choices[SCALES]))
        return name if ablation or name == record.method else None
    if choices or (ablation and record.method not in {"float"} | WHOLE):
        return None
    return AS_PRINTED.get(record.method, record.method)


def is_of(record: ScoreRecord, row: PublishedRow, *, ablation: bool) -> bool:
    """Whether a record is what a published row names, with what the row says must be changed and nothing else."""
    if row.choices:
        return AS_PRINTED.get(record.method, record.method) == row.method and changed(record) == row.choices
    return published_name(record, ablation=ablation) == row.method


def measured(record: ScoreRecord, score: str) -> float | None:
    """A record's number for a published column."""
    if score == "size_mb":
        return record.weights_bytes / 2**20
    if score == "gpu_hours":
        seconds = record.cost.get("quantization_seconds")
        return None if seconds is None or record.environment.get("device", "cpu") == "cpu" else seconds / 3600
    return record.scores.get(score)


def _settings(record: ScoreRecord) -> str:
    """What all seeds of one experiment share."""
    effort = [record.cost.get(name) for name in EFFORT]
    method = record.settings.get("hash")
    return json.dumps([record.protocol, record.evaluator, record.quantized, effort, method], sort_keys=True)


def _best(
    row: PublishedRow, score: str, records: Sequence[ScoreRecord]
) -> tuple[list[ScoreRecord], list[str], list[str]]:
    """The seeds of the experiment nearest to a published row, what still differs, and what to note."""
    groups: dict[str, list[ScoreRecord]] = {}
    for record in records:
        groups.setdefault(_settings(record), []).append(record)
    ranked = sorted(groups.values(), key=lambda g: (len(differing(row, g[0], score)), -g[0].protocol.get("images", 0)))
    chosen, differs = ranked[0], differing(row, ranked[0][0], score)
    notes: list[str] = []
    alike = [group for group in ranked[1:] if len(differing(row, group[0], score)) == len(differs)]
    if alike:
        notes.append(f"one of {len(alike) + 1} experiments of ours, which differ in coverage, effort or protocol")
    seeds = {record.seed: record for record in chosen}
    if len(seeds) < len(chosen):
        notes.append("of several runs with one seed, the last")
    return list(seeds.values()), differs, notes


def _on_scale(values: list[float], paper: float, score: str) -> list[float]:
    """CLIP scores are cosines, or a hundred of them: ours are put on the paper's scale."""
    if score != "clip" or (paper <= 1) == (max(values) <= 1):
        return values
    return [value / 100 if paper <= 1 else value * 100 for value in values]


def _has_float(record: ScoreRecord, records: Sequence[ScoreRecord]) -> bool:
    key = (record.model, record.protocol, record.evaluator)
    return any(r.method == "float" and (r.model, r.protocol, r.evaluator) == key for r in records)


def _cell(row: PublishedRow, score: str, records: Sequence[ScoreRecord], *, ablation: bool, variant: bool) -> Cell:
    """One published number, and ours beside it."""
    paper = _numbers(row)[score]
    spread = row.scores.get("fid_spread") if score == "fid" else None
    notes = [] if variant or not row.note else [row.note]
    mine = [
        record
        for record in records
        if record.quant == row.bits and is_of(record, row, ablation=ablation) and measured(record, score) is not None
    ]
    empty = Cell(paper, spread, row.verified, notes=tuple(notes))
    if not mine:
        return empty
    chosen, differs, remarks = _best(row, score, mine)
    if variant and differs and not row.choices:
        return empty  # which of the variants ours would be is not known
    ours = [value for r in chosen if (value := measured(r, score)) is not None]
    if paper is None:
        return Cell(ours=tuple(ours), notes=(*notes, *remarks))
    ours = _on_scale(ours, paper, score)
    notes += remarks
    if differs:
        notes.append("; ".join(differs))
    elif missing := unstated(row) if score in QUALITY else []:
        notes.append(f"the paper's {', '.join(missing)} not known")
    if row.method != "float" and not _has_float(chosen[0], records):
        notes.append("no float row of ours under this protocol and evaluator")
    difference = None if differs else statistics.mean(ours) - paper
    return Cell(paper, spread, row.verified, tuple(ours), difference, tuple(notes))


def compare(rows: Sequence[PublishedRow], records: Sequence[ScoreRecord], model: str | None = None) -> Comparison:
    """One published table beside the records of runs. The float network comes first.

    Args:
        rows: of `choose`.
        records: of any model.
        model: whose records stand beside the numbers of all of the paper's models, with lines for bits that the paper does
            not print; None for each of them its own.
    """
    models = dict.fromkeys(row.model for row in rows)
    own = {name: [record for record in records if record.model == (model or name)] for name in models}
    named = {(row.model, name) for row in rows for name in _numbers(row)}
    order = [*SCORE_ORDER, *(CHANGE + name for name in SCORE_ORDER)]
    columns = tuple((model, name) for model in models for name in order if (model, name) in named)
    ablation = any(row.method == "tiar" for row in rows)
    lines: list[tuple[str, str, tuple[Cell, ...]]] = []
    for bits, label, members, variant in [*_lines(rows), *_lines(_unprinted(rows, records, model))]:
        cells: Mapping[tuple[str, str], Cell] = {
            (row.model, score): _cell(row, score, own[row.model], ablation=ablation, variant=variant)
            for row in members
            for score in _numbers(row)
        }
        lines.append((bits, label, tuple(cells.get(column, Cell()) for column in columns)))
    without = [model for model in models if not any(r.method == "float" for r in rows if r.model == model)]
    notes = (f"the table as known here has no float row of {', '.join(without)}",) if without else ()
    notes = notes if model is None else (*notes, f"ours are of {model} in every column")
    first = rows[0]
    return Comparison(first.paper, first.reference, first.table, first.title, columns, tuple(lines), notes)


def _unprinted(rows: Sequence[PublishedRow], records: Sequence[ScoreRecord], model: str | None) -> list[PublishedRow]:
    """The rows of the first pair of bits again, for every pair that was measured with a model and is not printed."""
    if model is None:
        return []
    printed = [row.bits for row in rows if row.method != "float"]
    measured_bits = dict.fromkeys(r.quant for r in records if r.model == model and r.method != "float")
    again = [row for row in rows if row.bits == printed[0]]
    return [
        replace(row, bits=bits, scores=dict.fromkeys(row.scores), verified="")
        for bits in sorted(measured_bits, key=bits_order)
        if bits not in printed
        for row in again
    ]

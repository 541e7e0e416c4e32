"""A published table compared with the records of runs; differences are given only where both were made alike."""

import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import chain
from typing import Any, NamedTuple

from tfmq_exp.report.comparability import FLOAT, bits_order, comparison_key, group_by, join, setting_key
from tfmq_exp.report.protocol_match import INCEPTION, is_of_row, protocol_differences, unstated_fields
from tfmq_exp.report.published_tables import VERIFIED, PublishedRow
from tfmq_exp.report.records import ScoreRecord
from tfmq_exp.report.tables import cell, render

CHANGE = "change of "  # a published difference from a baseline
PLAIN_TITLES = {
    **{"fid": "FID ↓", "sfid": "sFID ↓", "is": "IS ↑", "clip": "CLIP ↑", "precision": "precision ↑"},
    **{"gpu_hours": "GPU hours ↓", "memory_mb": "memory, MB ↓", "size_mb": "size, MB ↓", "latency_s": "latency, s ↓"},
    "speedup": "speed-up ↑",
}
SCORE_TITLES = PLAIN_TITLES | {CHANGE + name: CHANGE + title for name, title in PLAIN_TITLES.items()}
CSV_COLUMNS = ("paper", "verified", "ours", "std", "seeds", "difference", "notes")
NONE = "—"


class Cell(NamedTuple):
    """One score of one model."""

    paper: float | None = None  # the printed number, if there is one
    spread: float | None = None  # the number after its plus-minus sign
    verified: str = ""
    ours: tuple[float, ...] = ()  # of every seed; empty where nothing was measured
    difference: float | None = None  # mean of ours less the paper's, where the protocols match
    notes: tuple[str, ...] = ()  # on either number, for the reader


class Comparison(NamedTuple):
    """A table: its first published row, columns (model, score), lines (bits, method, a cell for every column)."""

    first: PublishedRow
    columns: list[tuple[str, str]]
    lines: list[tuple[str, str, list[Cell]]]
    notes: list[str]


def _numbers(row: PublishedRow) -> dict[str, float | None]:
    """The printed numbers of a row, by the name of their column."""
    scores = {name: value for name, value in row.scores.items() if name != "fid_spread"}
    return scores | {CHANGE + name: value for name, value in row.deltas.items()}


def _lines(rows: Sequence[PublishedRow]) -> Iterator[tuple[str, str, list[PublishedRow], bool]]:
    """Bits, method, rows, and whether they are a variant: rows with the same columns are separated by their notes."""
    groups = group_by(rows, lambda row: (row.bits, row.method))
    for (bits, method), members in sorted(groups.items(), key=lambda item: item[0][1] != FLOAT):
        columns = [(row.model, name) for row in members for name in _numbers(row)]
        if len(columns) == len(set(columns)):
            yield bits, method, members, False
            continue
        for note, variant in group_by(members, lambda row: row.note).items():
            yield bits, f"{method} ({note})" if note else method, variant, True


def _measured(record: ScoreRecord, score: str) -> float | None:
    """A record's number for a published column."""
    if score == "size_mb":
        return record.weights_bytes / 2**20
    if score == "gpu_hours":
        seconds = record.cost.get("quantization_seconds")
        return None if seconds is None or record.environment.get("device", "cpu") == "cpu" else seconds / 3600
    return record.scores.get(score)


def _nearest_experiment(
    row: PublishedRow, score: str, records: Sequence[ScoreRecord]
) -> tuple[list[ScoreRecord], list[str], list[str]]:
    """The seeds of the experiment nearest to a published row, how its protocol differs, and notes."""
    experiments = list(group_by(records, lambda record: (comparison_key(record), setting_key(record))).values())
    differences = [protocol_differences(row, experiment[0], score) for experiment in experiments]
    order = range(len(experiments))
    nearest = min(order, key=lambda i: (len(differences[i]), -experiments[i][0].protocol.get("images", 0)))
    alike = sum(len(each) == len(differences[nearest]) for each in differences)
    notes = [f"one of {alike} experiments of ours, which differ in coverage, effort or protocol"] if alike > 1 else []
    seeds = {record.seed: record for record in experiments[nearest]}
    notes += ["of several runs with one seed, the last"] if len(seeds) < len(experiments[nearest]) else []
    return list(seeds.values()), differences[nearest], notes


def _cell(row: PublishedRow, score: str, records: Sequence[ScoreRecord], *, ablation: bool, variant: bool) -> Cell:
    """One published number, and ours."""
    paper = _numbers(row)[score]
    notes = [] if variant or not row.note else [row.note]
    empty = Cell(paper, row.scores.get("fid_spread") if score == "fid" else None, row.verified, notes=tuple(notes))
    measured = [r for r in records if is_of_row(r, row, ablation=ablation) and _measured(r, score) is not None]
    if not measured:
        return empty
    seeds, differences, remarks = _nearest_experiment(row, score, measured)
    if variant and differences and not row.choices:
        return empty  # which of the variants ours would be is not known
    ours = [value for record in seeds if (value := _measured(record, score)) is not None]
    notes += remarks
    if paper is None:
        return Cell(ours=tuple(ours), notes=tuple(notes))
    if score == "clip" and (paper <= 1) != (max(ours) <= 1):  # cosines, or a hundred times cosines
        ours = [value / 100 if paper <= 1 else value * 100 for value in ours]
    if differences:
        notes.append("; ".join(differences))
    elif score in INCEPTION | {"clip"} and (unstated := unstated_fields(row)):
        notes.append(f"the paper's {', '.join(unstated)} not known")
    protocol = comparison_key(seeds[0])
    if row.method != FLOAT and not any(r.method == FLOAT and comparison_key(r) == protocol for r in records):
        notes.append("no float row of ours under this protocol and evaluator")
    difference = None if differences else statistics.mean(ours) - paper
    return empty._replace(ours=tuple(ours), difference=difference, notes=tuple(notes))


def compare(rows: Sequence[PublishedRow], records: Sequence[ScoreRecord], model: str | None = None) -> Comparison:
    """Compare a published table (of `find_table`) with the records of runs. The float network comes first.

    `model` is the one whose records are compared with the numbers of all of the paper's models, with lines for bits that
    the paper does not print; None for each of them its own.
    """
    models = dict.fromkeys(row.model for row in rows)
    own = {name: [record for record in records if record.model == (model or name)] for name in models}
    printed = {(row.model, name) for row in rows for name in _numbers(row)}
    columns = [(name, score) for name in models for score in SCORE_TITLES if (name, score) in printed]
    ablation = any(row.method == "tiar" for row in rows)
    lines: list[tuple[str, str, list[Cell]]] = []
    for bits, label, members, variant in [*_lines(rows), *_lines(_unprinted(rows, own) if model else [])]:
        cells = {
            (row.model, score): _cell(row, score, own[row.model], ablation=ablation, variant=variant)
            for row in members
            for score in _numbers(row)
        }
        lines.append((bits, label, [cells.get(column, Cell()) for column in columns]))
    without = [name for name in models if not any(row.method == FLOAT for row in rows if row.model == name)]
    notes = [f"the table as known here has no float row of {', '.join(without)}"] if without else []
    notes += [f"ours are of {model} in every column"] if model else []
    return Comparison(rows[0], columns, lines, notes)


def _unprinted(rows: Sequence[PublishedRow], own: Mapping[str, Sequence[ScoreRecord]]) -> list[PublishedRow]:
    """The rows of the first pair of bits again, without numbers, for all bits that were measured and are not printed."""
    printed = [row.bits for row in rows if row.method != FLOAT]
    measured = {record.quant for records in own.values() for record in records if record.method != FLOAT}
    return [
        replace(row, bits=bits, scores=dict.fromkeys(row.scores), deltas=dict.fromkeys(row.deltas), verified="")
        for bits in sorted(measured - set(printed), key=bits_order)
        for row in rows
        if row.bits in printed[:1]
    ]


def published_rows(
    records: Sequence[ScoreRecord], published: Sequence[PublishedRow]
) -> tuple[list[dict[str, Any]], dict[str, list[str]]]:
    """Published numbers of these records' model beside ours, the float network's last; and rows without ours, by table."""
    rows: list[dict[str, Any]] = []
    unmeasured: dict[str, list[str]] = {}
    own = [row for row in published if row.model == records[0].model]
    for (paper, name, reference), table in group_by(own, lambda row: (row.paper, row.table, row.reference)).items():
        source = f"{paper}{reference and f' ({reference})'}, table {name}"
        comparison = compare(table, records)
        for bits, method, cells in comparison.lines:
            for (_, score), of in zip(comparison.columns, cells, strict=True):
                if of.ours:
                    row = {"bits": bits, "method": method, "score": SCORE_TITLES[score], "source": source}
                    row |= {"n": len(of.ours), "verified": VERIFIED[of.verified][1], "notes": of.notes}
                    row["ours"] = cell(of.ours, 2 if abs(statistics.mean(of.ours)) >= 1 else 3)
                    row["paper"] = " ± ".join(f"{number:g}" for number in (of.paper, of.spread) if number is not None)
                    row["difference"] = "" if of.difference is None else f"{of.difference:+.2f}"
                    rows.append(row)
            unmeasured.setdefault(source, []).extend([] if any(of.ours for of in cells) else [f"{bits} {method}"])
    rows.sort(key=lambda row: (row["method"] == FLOAT, bits_order(row["bits"]), row["method"], row["score"]))
    return rows, unmeasured


def _printed_parts(cell: Cell) -> tuple[str, str, str, str, str]:
    """Paper, ours, deviation, seeds, difference with the paper's decimals, two at least; empty where there is none."""
    known = f"{cell.paper:.6f}".rstrip("0") if cell.paper is not None else ""
    digits = max(2, len(known.partition(".")[2]))
    paper = "" if cell.paper is None else f"{cell.paper:.{digits}f}"
    paper += "" if cell.spread is None else f" ± {cell.spread:.2f}"
    if not cell.ours:
        return paper, "", "", "", ""
    deviation = f"{statistics.stdev(cell.ours):.{digits}f}" if len(cell.ours) > 1 else ""
    difference = "" if cell.difference is None else f"{cell.difference:+.{digits}f}"
    return paper, f"{statistics.mean(cell.ours):.{digits}f}", deviation, str(len(cell.ours)), difference


def comparison_csv(comparison: Comparison) -> str:
    """The comparison with a column for every part of a cell."""
    header = [f"{model} {SCORE_TITLES[score]} {part}" for model, score in comparison.columns for part in CSV_COLUMNS]

    def parts(cell: Cell) -> tuple[str, ...]:
        paper, *ours = _printed_parts(cell)
        return paper, cell.verified, *ours, "; ".join(cell.notes)

    rows = [[bits, method, *chain(*map(parts, cells))] for bits, method, cells in comparison.lines]
    return render(["bits", "method", *header], rows, "csv")


def comparison_markdown(comparison: Comparison) -> str:
    """A title, the table, numbered footnotes, and the meaning of the marks."""
    numbers: dict[str, int] = {}

    def text(cell: Cell) -> str:
        if cell.paper is None and not cell.ours:
            return NONE
        paper, mean, deviation, seeds, difference = _printed_parts(cell)
        spread = f" ± {deviation}" if deviation else ""
        ours = f"{mean}{spread} ({seeds} seed{'s' if seeds != '1' else ''})" if mean else NONE
        notes = "".join(f"[{numbers.setdefault(note, len(numbers) + 1)}]" for note in cell.notes)
        theirs = f"{paper} {VERIFIED[cell.verified][0]}" if paper else NONE
        return f"{theirs} \\| {ours} \\| {difference or NONE} {notes}".rstrip()

    header = ["bits", "method", *(f"{model} {SCORE_TITLES[score]}" for model, score in comparison.columns)]
    rows = [[bits, method, *map(text, cells)] for bits, method, cells in comparison.lines]
    first = comparison.first
    verified = {cell.verified for _, _, cells in comparison.lines for cell in cells}
    legend = ", ".join(f"{mark} {meaning}" for name, (mark, meaning) in VERIFIED.items() if name in verified)
    lines = [
        f"**{join(first.paper, first.reference)}. Table {first.table}: {first.title}**",
        "",
        "paper \\| ours ± standard deviation over seeds \\| ours less the paper's, where both were made alike",
        "",
        render(header, rows, "markdown"),
        *(f"[{number}] {note}  " for note, number in numbers.items()),
        *(f"{note}  " for note in comparison.notes),
        f"Published numbers: {legend}.",
    ]
    return "\n".join(lines) + "\n"

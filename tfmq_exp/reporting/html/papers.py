"""Published numbers beside ours: where the protocols agree with a difference, else with what differs."""

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from tfmq_exp.report.comparison import CHANGE, Cell, Comparison, compare
from tfmq_exp.report.comparison_text import MARKS, NAMES
from tfmq_exp.report.html.ways import FLOAT, Group
from tfmq_exp.report.published_tables import PublishedRow
from tfmq_exp.report.tables import bits_order, cell


@dataclass(frozen=True)
class PaperLine:
    """A published number that we have one beside.

    Args:
        source: paper and table.
        verified: how the number was seen, in words.
        difference: ours less theirs; empty where the protocols do not agree.
        notes: what differs, and what a reader must know.
    """

    bits: str
    method: str
    score: str
    ours: str
    seeds: int
    paper: str
    difference: str
    source: str
    verified: str
    notes: tuple[str, ...]


def beside(group: Group, published: Sequence[PublishedRow]) -> list[PaperLine]:
    """Every published number of the group's model that one of ours can stand beside; the float network's last."""
    lines = [
        _line(comparison, bits, method, score, found)
        for comparison in _comparisons(group, published)
        for bits, method, cells in comparison.lines
        for (_, score), found in zip(comparison.columns, cells, strict=True)
        if found.ours
    ]
    return sorted(lines, key=lambda line: (line.method == FLOAT, bits_order(line.bits), line.method, line.score))


def unmeasured(together: Iterable[Group], published: Sequence[PublishedRow]) -> Mapping[str, Mapping[str, list[str]]]:
    """Bits and methods of published tables that no group of their model has a run of, by model and table."""
    found: dict[str, dict[str, list[str]]] = {}
    for group in together:
        tables = found.setdefault(group.model, {})
        for comparison in _comparisons(group, published):
            rows = [f"{bits} {method}" for bits, method, cells in comparison.lines if not any(c.ours for c in cells)]
            before = tables.get(_source(comparison), rows)
            tables[_source(comparison)] = [row for row in rows if row in before]
    return {model: {title: rows for title, rows in tables.items() if rows} for model, tables in found.items()}


def _comparisons(group: Group, published: Sequence[PublishedRow]) -> list[Comparison]:
    tables: dict[tuple[str, str], list[PublishedRow]] = {}
    for row in published:
        if row.model == group.model:
            tables.setdefault((row.paper, row.table), []).append(row)
    records = [record for way in group.ways for record in way.records]
    return [compare(rows, records) for rows in tables.values()]


def _source(comparison: Comparison) -> str:
    reference = f" ({comparison.reference})" if comparison.reference else ""
    return f"{comparison.paper}{reference}, table {comparison.table}"


def _line(comparison: Comparison, bits: str, method: str, score: str, found: Cell) -> PaperLine:
    plain = score.removeprefix(CHANGE)
    paper = "" if found.paper is None else f"{found.paper:g}"
    if found.spread is not None:
        paper += f" ± {found.spread:g}"
    return PaperLine(
        bits,
        method,
        (CHANGE if plain != score else "") + NAMES[plain],
        cell(found.ours, 2 if abs(statistics.mean(found.ours)) >= 1 else 3),
        len(found.ours),
        paper,
        "" if found.difference is None else f"{found.difference:+.2f}",
        _source(comparison),
        MARKS[found.verified][1],
        found.notes,
    )

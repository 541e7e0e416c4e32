"""Published numbers compared with ours: a difference where the protocols match, else how they differ."""

import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from tfmq_exp.report.comparability import group_by
from tfmq_exp.report.comparison import MARKS, Cell, Comparison, compare, score_title
from tfmq_exp.report.html.grouping import Group
from tfmq_exp.report.published_tables import PublishedRow
from tfmq_exp.report.tables import FLOAT, bits_order, cell


class ComparedRow(NamedTuple):
    """A published number with one of ours, and the paper and table that it is from."""

    bits: str
    method: str
    score: str
    source: str
    cell: Cell

    @property
    def ours(self) -> str:
        """Mean and standard deviation over seeds."""
        return cell(self.cell.ours, 2 if abs(statistics.mean(self.cell.ours)) >= 1 else 3)

    @property
    def paper(self) -> str:
        """The printed number; empty where there is none."""
        numbers = [number for number in (self.cell.paper, self.cell.spread) if number is not None]
        return " ± ".join(f"{number:g}" for number in numbers)

    @property
    def difference(self) -> str:
        """Our number minus the paper's; empty where the protocols do not match."""
        return "" if self.cell.difference is None else f"{self.cell.difference:+.2f}"

    @property
    def verified(self) -> str:
        """Verification of the printed number, in words."""
        return MARKS[self.cell.verified][1]


def compared_rows(group: Group, published: Sequence[PublishedRow]) -> list[ComparedRow]:
    """Every published number of the group's model that one of ours can be compared with; the float network's last."""
    rows = [
        ComparedRow(bits, method, score_title(score), source, found)
        for source, comparison in _comparisons(group, published)
        for bits, method, cells in comparison.lines
        for (_, score), found in zip(comparison.columns, cells, strict=True)
        if found.ours
    ]
    return sorted(rows, key=lambda row: (row.method == FLOAT, bits_order(row.bits), row.method, row.score))


def unmeasured_rows(
    groups: Sequence[Group], published: Sequence[PublishedRow]
) -> Mapping[str, Mapping[str, list[str]]]:
    """Bits and methods of published tables that no group of their model has a run of, by model and table."""
    found: dict[str, dict[str, list[str]]] = {}
    for group in groups:
        tables = found.setdefault(group.model, {})
        for source, comparison in _comparisons(group, published):
            rows = [f"{bits} {method}" for bits, method, cells in comparison.lines if not any(c.ours for c in cells)]
            tables[source] = [row for row in rows if row in tables.get(source, rows)]
    return {model: {title: rows for title, rows in tables.items() if rows} for model, tables in found.items()}


def _comparisons(group: Group, published: Sequence[PublishedRow]) -> Iterator[tuple[str, Comparison]]:
    """Comparisons with all published tables of the group's model, and their sources."""
    own = [row for row in published if row.model == group.model]
    for rows in group_by(own, lambda row: (row.paper, row.table)).values():
        reference = f" ({rows[0].reference})" if rows[0].reference else ""
        yield f"{rows[0].paper}{reference}, table {rows[0].table}", compare(rows, group.records)

"""Published numbers compared with ours: a difference where the protocols match, else how they differ."""

import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from tfmq_exp.report.comparability import FLOAT, bits_order, group_by
from tfmq_exp.report.comparison import SCORE_TITLES, Comparison, compare
from tfmq_exp.report.html.grouping import Group
from tfmq_exp.report.published_tables import VERIFIED, PublishedRow
from tfmq_exp.report.tables import cell


def compared_rows(group: Group, published: Sequence[PublishedRow]) -> list[dict[str, Any]]:
    """Every published number of the group's model that one of ours can be compared with; the float network's last."""
    rows: list[dict[str, Any]] = []
    for source, comparison in _comparisons(group, published):
        for bits, method, cells in comparison.lines:
            for (_, score), found in zip(comparison.columns, cells, strict=True):
                if not found.ours:
                    continue
                row = {"bits": bits, "method": method, "score": SCORE_TITLES[score], "source": source}
                row |= {"n": len(found.ours), "verified": VERIFIED[found.verified][1], "notes": found.notes}
                row["ours"] = cell(found.ours, 2 if abs(statistics.mean(found.ours)) >= 1 else 3)
                row["paper"] = " ± ".join(f"{n:g}" for n in (found.paper, found.spread) if n is not None)
                row["difference"] = "" if found.difference is None else f"{found.difference:+.2f}"
                rows.append(row)
    return sorted(rows, key=lambda r: (r["method"] == FLOAT, bits_order(r["bits"]), r["method"], r["score"]))


def unmeasured_rows(
    groups: Sequence[Group], published: Sequence[PublishedRow]
) -> Mapping[str, Mapping[str, list[str]]]:
    """Bits and methods of published tables that no group of their model has a run of, by model and table."""
    found: dict[str, dict[str, list[str]]] = {}
    for group in groups:
        tables = found.setdefault(group.first.model, {})
        for source, comparison in _comparisons(group, published):
            rows = [f"{bits} {method}" for bits, method, cells in comparison.lines if not any(c.ours for c in cells)]
            tables[source] = [row for row in rows if row in tables.get(source, rows)]
    return {model: {title: rows for title, rows in tables.items() if rows} for model, tables in found.items()}


def _comparisons(group: Group, published: Sequence[PublishedRow]) -> Iterator[tuple[str, Comparison]]:
    """Comparisons with all published tables of the group's model, and their sources."""
    own = [row for row in published if row.model == group.first.model]
    for rows in group_by(own, lambda row: (row.paper, row.table)).values():
        reference = f" ({rows[0].reference})" if rows[0].reference else ""
        yield f"{rows[0].paper}{reference}, table {rows[0].table}", compare(rows, group.records)

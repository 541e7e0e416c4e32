"""Rows of a table."""

from typing import Any

Row = dict[str, Any]


def grouped(rows: list[Row], key: str) -> dict[Any, list[Row]]:
    """Rows by their value of a column, in the order of first appearance."""
    groups: dict[Any, list[Row]] = {}
    for row in rows:
        groups.setdefault(row[key], []).append(row)
    return groups

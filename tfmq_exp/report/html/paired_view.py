"""Distances from the float images of a group's run folders, and its methods against each other on the same images."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tfmq_exp.report.html.comparison_page import numbered
from tfmq_exp.report.html.grouping import Group
from tfmq_exp.report.image_distances import DISTANCES, DISTANCES_FILE
from tfmq_exp.report.paired_tables import Member, distance_table, distances_in, members_of, networks_of, paired_table


def paired_view(group: Group, problems: list[str]) -> dict[str, Any]:
    """Tables of a group; empty without files of distances. A damaged file is named among the problems."""
    members: list[Member] = []
    for folder, records in _records_by_folder(group).items():
        try:
            members += members_of(records, folder / DISTANCES_FILE)
        except (OSError, ValueError) as error:
            problems.append(f"{folder.name}: {DISTANCES_FILE} cannot be read: {' '.join(str(error).split())[:200]}")
    if not members:
        return {}
    (networks,) = networks_of(members)
    tables = {DISTANCES[name].title: paired_table(networks, name) for name in distances_in(networks)}
    return {
        "distances": numbered(distance_table(networks)),
        "paired": {name: numbered(table) for name, table in tables.items() if table[1]},
    }


def _records_by_folder(group: Group) -> dict[Path, Sequence[Any]]:
    found: dict[Path, list[Any]] = {}
    for variant in group.variants:
        for record, run in zip(variant.records, variant.runs, strict=True):
            if not run.saved and (run.folder / DISTANCES_FILE).is_file():
                found.setdefault(run.folder, []).append(record)
    return dict(found)

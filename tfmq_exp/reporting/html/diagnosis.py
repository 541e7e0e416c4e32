"""What a run's `diagnosis/` folder holds: plots, and the heads of tables."""

import csv
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tfmq_exp.report.html.pictures import Picture, gallery
from tfmq_exp.report.html.runs import Run

LINES = 40  # of a table
RUNS = 12  # whose folders are shown
FILES = 24  # of one run


@dataclass(frozen=True)
class HeadOfTable:
    """The first lines of a CSV file; `more` says whether there are others."""

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    more: bool


@dataclass(frozen=True)
class Diagnosis:
    """What one run's folder holds."""

    name: str
    pictures: tuple[Picture, ...]
    tables: tuple[HeadOfTable, ...]
    left_out: int


def diagnoses(runs: Sequence[Run], problems: list[str]) -> tuple[list[Diagnosis], int]:
    """Of the first runs that have such a folder, and how many more do; damaged files are named among the problems."""
    there = [run for run in runs if run.state != "found" and not run.saved and (run.folder / "diagnosis").is_dir()]
    return [_diagnosis(run, problems) for run in there[:RUNS]], max(0, len(there) - RUNS)


def _diagnosis(run: Run, problems: list[str]) -> Diagnosis:
    folder = run.folder / "diagnosis"
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in (".png", ".csv"))
    plots = [(str(path.relative_to(folder)), path) for path in files[:FILES] if path.suffix.lower() == ".png"]
    tables = [found for path in files[:FILES] if path.suffix.lower() == ".csv" and (found := _head(path, problems))]
    return Diagnosis(run.name, tuple(gallery(plots, problems)), tuple(tables), max(0, len(files) - FILES))


def _head(path: Path, problems: list[str]) -> HeadOfTable | None:
    try:
        with path.open(newline="", encoding="utf-8") as file:
            lines = [tuple(line) for line in itertools.islice(csv.reader(file), LINES + 2)]
    except (OSError, ValueError, csv.Error) as error:
        problems.append(f"{path} cannot be read: {error}")
        return None
    if not lines:
        return None
    header, *rows = lines
    return HeadOfTable(path.name, header, tuple(map(_short, rows[:LINES])), len(rows) > LINES)


def _short(row: tuple[str, ...]) -> tuple[str, ...]:
    """Numbers with five digits that say something."""

    def brief(text: str) -> str:
        try:
            return text if text.lstrip("-").isdecimal() else f"{float(text):.5g}"
        except ValueError:
            return text

    return tuple(map(brief, row))

"""The table of a group: one line for every way of quantizing, mean and deviation over its seeds, the best ones marked."""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tfmq_exp.reporting.html.ways import Group, Way
from tfmq_exp.reporting.records import ScoreRecord
from tfmq_exp.reporting.tables import columns

# scores that only some evaluators have, beside those of every table
FURTHER = (
    ("kid", "KID", "↓", 5),
    ("precision", "precision", "↑", 3),
    ("recall", "recall", "↑", 3),
    ("clip", "CLIP", "↑", 3),
)
JUDGED = 5  # how many columns of every table say how good something is; what follows is what it costs


@dataclass(frozen=True)
class Column:
    """A column.

    Args:
        title: what it shows.
        read: how it is read off a record.
        digits: decimals.
        better: an arrow to the better side; empty where there is none.
        judge: the evaluator whose score it is; empty for what is no score of images.
    """

    title: str
    read: Callable[[ScoreRecord], float | None]
    digits: int
    better: str
    judge: str = ""


@dataclass(frozen=True)
class ScoreCell:
    """A number of the table. `mean` is None where nothing was measured."""

    mean: float | None
    text: str
    spread: str
    best: bool = False


@dataclass(frozen=True)
class Line:
    """A line of the table."""

    way: Way
    seeds: tuple[int, ...]
    cells: tuple[ScoreCell, ...]


@dataclass(frozen=True)
class ScoreTable:
    """The table of a group."""

    columns: tuple[Column, ...]
    lines: tuple[Line, ...]


def score_columns(evaluator: str) -> list[Column]:
    """All columns there could be; a score carries the evaluator's name."""
    shared = columns(evaluator)
    whose = f" ({evaluator})"
    judged = [
        Column(title.rstrip(" ↓↑").removesuffix(whose), read, digits, title[-1], evaluator if whose in title else "")
        for title, read, digits in shared[:JUDGED]
    ]
    further = [
        Column(title, lambda r, name=name: r.scores.get(name), digits, better, evaluator)
        for name, title, better, digits in FURTHER
    ]
    costs = [Column(title, read, digits, "") for title, read, digits in shared[JUDGED:]]
    size = Column("size, MB", lambda r: r.weights_bytes / 1e6, 2, "")
    return [*judged[:3], *further, *judged[3:], size, *costs]


def score_table(group: Group) -> ScoreTable:
    """Lines of a group; columns without any number are left out."""
    found = score_columns(str(group.evaluator["name"]))
    values = [[_values(column, way) for column in found] for way in group.ways]
    used = [i for i in range(len(found)) if any(row[i] for row in values)]
    lines = []
    for way, row in zip(group.ways, values, strict=True):
        rivals = [other for name, other in zip(group.ways, values, strict=True) if name.bits == way.bits]
        cells = tuple(_cell(found[i], row[i], [other[i] for other in rivals if other[i]]) for i in used)
        lines.append(Line(way, tuple(record.seed for record in way.records), cells))
    return ScoreTable(tuple(found[i] for i in used), tuple(lines))


def _values(column: Column, way: Way) -> list[float]:
    return [value for record in way.records if (value := column.read(record)) is not None]


def _cell(column: Column, values: list[float], rivals: Sequence[list[float]]) -> ScoreCell:
    """Mean and sample deviation; the best of two or more with the same bits is marked, and whoever shows the same."""
    if not values:
        return ScoreCell(None, "–", "")
    mean = statistics.mean(values)
    spread = f"± {statistics.stdev(values):.{column.digits}f}" if len(set(values)) > 1 else ""
    text = f"{mean:.{column.digits}f}"
    if not column.better or len(rivals) < 2:
        return ScoreCell(mean, text, spread)
    pick = min if column.better == "↓" else max
    best = pick(statistics.mean(other) for other in rivals)
    return ScoreCell(mean, text, spread, best=text == f"{best:.{column.digits}f}")

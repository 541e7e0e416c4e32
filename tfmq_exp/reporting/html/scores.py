"""The table of a group: one line for every way of quantizing, mean and deviation over its seeds, the best ones marked.

Only lines that quantize the same and are executed alike can be the best of each other, and only means of several seeds are marked.
"""

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from tfmq_exp.report.html.ways import Group, Way
from tfmq_exp.report.records import ScoreRecord
from tfmq_exp.report.tables import columns

# scores that only some evaluators have, beside those of every table
FURTHER = (
    ("kid", "KID", "↓", 5),
    ("precision", "precision", "↑", 3),
    ("recall", "recall", "↑", 3),
    ("clip", "CLIP", "↑", 3),
)
JUDGED, COVERAGE = (
    5,
    3,
)  # columns of every table that say how good something is, then what is quantized, then what it costs
ALIKE = 0.05  # between shares of coverage that count as the same
SEEDS = 3  # of a mean that is marked: fewer have no deviation to trust
DOMINATES = 3  # times the next greatest: a seed that makes the mean its own
Mark = Literal["", "close", "best"]


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
    """A number of the table.

    Args:
        mean: None where nothing was measured.
        mark: "best" of the same bits and coverage; "close" where one standard deviation cannot tell the best ones apart.
        seeds: what every seed says, to look up; empty for one.
        dominated: the seed that makes the mean its own.
    """

    mean: float | None
    text: str
    spread: str
    mark: Mark = ""
    seeds: str = ""
    dominated: int | None = None


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
    covered, costs = (
        [Column(title, read, digits, "") for title, read, digits in some]
        for some in (shared[JUDGED : JUDGED + COVERAGE], shared[JUDGED + COVERAGE :])
    )
    executed = Column("layers on the engine", lambda r: r.quantized.get("layers_executed"), 3, "")
    size = Column("size, MB", lambda r: r.weights_bytes / 1e6, 2, "")
    return [*covered, executed, *judged[:3], *further, *judged[3:], size, *costs]


def score_table(group: Group) -> ScoreTable:
    """Lines of a group; columns without any number are left out."""
    found = score_columns(str(group.evaluator["name"]))
    values = [[_values(column, way) for column in found] for way in group.ways]
    used = [i for i in range(len(found)) if any(row[i] for row in values)]
    lines = []
    for way, row in zip(group.ways, values, strict=True):
        rivals = [
            other
            for rival, other in zip(group.ways, values, strict=True)
            if rival.bits == way.bits and rival.engine == way.engine and alike(coverage(rival), coverage(way))
        ]
        cells = tuple(_cell(found[i], row[i], [list(other[i].values()) for other in rivals if other[i]]) for i in used)
        lines.append(Line(way, tuple(record.seed for record in way.records), cells))
    return ScoreTable(tuple(found[i] for i in used), tuple(lines))


def coverage(way: Way) -> tuple[float, ...]:
    """Shares of what is integer or quantized, in the table's order; what is not noted counts as nothing."""
    read = [read for _, read, _ in columns("")[JUDGED : JUDGED + COVERAGE]]
    return tuple(statistics.mean(one(record) or 0.0 for record in way.records) for one in read)


def alike(first: Sequence[float], second: Sequence[float]) -> bool:
    """Whether two ways quantize the same, but for a few layers."""
    return all(abs(a - b) <= ALIKE for a, b in zip(first, second, strict=True))


def dominated(values: Iterable[float]) -> bool:
    """Whether one of three or more seeds makes the mean its own: an outlier upwards."""
    ranked = sorted(values)
    return len(ranked) >= SEEDS and ranked[-1] > DOMINATES * ranked[-2] > 0


def _values(column: Column, way: Way) -> dict[int, float]:
    return {record.seed: value for record in way.records if (value := column.read(record)) is not None}


def _cell(column: Column, values: Mapping[int, float], rivals: Sequence[Sequence[float]]) -> ScoreCell:
    """Mean and sample deviation, and how they stand among the lines that they can be compared with."""
    if not values:
        return ScoreCell(None, "–", "")
    own = list(values.values())
    mean = statistics.mean(own)
    printed = {seed: f"{value:.{column.digits}f}" for seed, value in values.items()}
    spread = f"± {statistics.stdev(own):.{column.digits}f}" if len(set(printed.values())) > 1 else ""
    return ScoreCell(
        mean,
        f"{mean:.{column.digits}f}",
        spread,
        _mark(column.better, own, rivals) if column.better else "",
        ", ".join(f"seed {seed}: {text}" for seed, text in printed.items()) if spread else "",
        max(values, key=lambda seed: values[seed]) if column.better and dominated(own) else None,
    )


def _mark(better: str, own: Sequence[float], rivals: Sequence[Sequence[float]]) -> Mark:
    """Best, or not told apart from the best.

    Nothing where either has too few seeds, where one seed makes the mean, or where there is nothing to compare with.
    """
    pick = min if better == "↓" else max
    leader = pick(rivals, key=statistics.mean)
    if len(rivals) < 2 or min(len(leader), len(own)) < SEEDS or dominated(own) or _apart(leader, own):
        return ""
    near = [rival for rival in rivals if not (dominated(rival) or _apart(leader, rival))]
    return "close" if len(near) > 1 or dominated(leader) else "best"


def _apart(first: Sequence[float], second: Sequence[float]) -> bool:
    """Whether the means differ by more than either's deviation."""
    deviation = max(statistics.stdev(some) if len(some) > 1 else 0.0 for some in (first, second))
    return abs(statistics.mean(first) - statistics.mean(second)) > deviation

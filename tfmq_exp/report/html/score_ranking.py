"""The score table of a group: one line for every variant, mean and deviation over its seeds, the best ones marked.

Only variants that quantize the same and are executed alike can be the best of each other, and only means of several seeds
are marked.
"""

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from tfmq_exp.report.columns import COSTS, ERRORS, MORE_SCORES, SCORES, SHARES, Column, score_columns
from tfmq_exp.report.html.grouping import Group, Variant
from tfmq_exp.report.tables import mean_and_deviation

EXECUTED = Column("layers on the engine", lambda record: record.quantized.get("layers_executed"), 3)
SIZE = Column("size, MB", lambda record: record.weights_bytes / 1e6, 2)
SAME_SHARE = 0.05  # largest difference between shares that count as the same
MIN_SEEDS = 3  # of a mean that is marked: fewer have no deviation to trust
DOMINANT_RATIO = 3  # of the greatest seed to the next, from which on it makes the mean its own
Mark = Literal["", "close", "best"]


@dataclass(frozen=True)
class ScoreCell:
    """A number of the table.

    Args:
        mean: None where nothing was measured.
        mark: "best" of the same bits and coverage; "close" where one standard deviation cannot tell the best ones apart.
        seeds: the value of every seed, to look up; empty where all print the same.
        dominant: the seed that makes the mean its own.
    """

    mean: float | None
    text: str
    spread: str
    mark: Mark = ""
    seeds: str = ""
    dominant: int | None = None


class ScoreTable(NamedTuple):
    """The table of a group: a cell for every variant and column."""

    columns: list[Column]
    rows: list[tuple[Variant, list[ScoreCell]]]


def measured_scores(group: Group) -> list[Column]:
    """Scores of images that some variant has."""
    return _measured(group, score_columns((*SCORES, *MORE_SCORES), group.first.evaluator["name"]))


def _measured(group: Group, columns: Sequence[Column]) -> list[Column]:
    return [column for column in columns if any(column.read(record) is not None for record in group.records)]


def score_table(group: Group) -> ScoreTable:
    """The table of a group; columns without any number are left out."""
    before, after = _measured(group, [*SHARES, EXECUTED]), _measured(group, [*ERRORS, SIZE, *COSTS])
    columns = [*before, *measured_scores(group), *after]
    rows: list[tuple[Variant, list[ScoreCell]]] = []
    for variant in group.variants:
        alike = [other for other in group.variants if (other.bits, other.engine) == (variant.bits, variant.engine)]
        rivals = [other for other in alike if quantize_alike(variant, other)]
        rows.append((variant, [_cell(column, variant, rivals) for column in columns]))
    return ScoreTable(columns, rows)


def quantized_shares(variant: Variant) -> list[float]:
    """Shares of what is integer or quantized, in the order of `SHARES`; what is not noted counts as nothing."""
    return [statistics.mean(column.read(record) or 0.0 for record in variant.records) for column in SHARES]


def quantize_alike(first: Variant, second: Variant) -> bool:
    """Whether two variants quantize the same, but for a few layers."""
    pairs = zip(quantized_shares(first), quantized_shares(second), strict=True)
    return all(abs(a - b) <= SAME_SHARE for a, b in pairs)


def is_dominated(values: Iterable[float]) -> bool:
    """Whether one of three or more seeds makes the mean its own: an outlier upwards."""
    ranked = sorted(values)
    return len(ranked) >= MIN_SEEDS and ranked[-1] > DOMINANT_RATIO * ranked[-2] > 0


def _cell(column: Column, variant: Variant, rivals: Sequence[Variant]) -> ScoreCell:
    """Mean and sample deviation, and their rank among the rivals, which include the variant itself."""
    values = {record.seed: value for record in variant.records if (value := column.read(record)) is not None}
    if not values:
        return ScoreCell(None, "–", "")
    own = list(values.values())
    text, spread = mean_and_deviation(own, column.digits)
    mark = _mark(column.better, own, [found for rival in rivals if (found := rival.values(column.read))])
    seeds = ", ".join(f"seed {seed}: {value:.{column.digits}f}" for seed, value in values.items()) if spread else ""
    dominant = max(values, key=lambda seed: values[seed]) if column.better and is_dominated(own) else None
    return ScoreCell(statistics.mean(own), text, spread and f"± {spread}", mark, seeds, dominant)


def _mark(better: str, own: Sequence[float], rivals: Sequence[Sequence[float]]) -> Mark:
    """Best, or not distinguishable from the best.

    No mark where either has too few seeds, where one seed makes the mean, or where there is nothing to compare with.
    """
    if not better or len(rivals) < 2:
        return ""
    leader = (min if better == "↓" else max)(rivals, key=statistics.mean)
    if min(len(leader), len(own)) < MIN_SEEDS or is_dominated(own) or _differ(leader, own):
        return ""
    near = [rival for rival in rivals if not (is_dominated(rival) or _differ(leader, rival))]
    return "close" if len(near) > 1 or is_dominated(leader) else "best"


def _differ(first: Sequence[float], second: Sequence[float]) -> bool:
    """Whether the means differ by more than either's deviation."""
    deviation = max(statistics.stdev(values) if len(values) > 1 else 0.0 for values in (first, second))
    return abs(statistics.mean(first) - statistics.mean(second)) > deviation

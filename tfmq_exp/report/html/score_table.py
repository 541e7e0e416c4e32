"""The score table of a group: one line for every variant, mean and deviation over its seeds, the best ones marked; and warnings.

Only variants that quantize the same and are executed alike can be the best of each other, and only means of several seeds
are marked.
"""

import statistics
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from tfmq_exp.report import tables
from tfmq_exp.report.comparability import EXECUTED, group_by
from tfmq_exp.report.html.grouping import Group, Variant
from tfmq_exp.report.protocol_match import evaluator_family
from tfmq_exp.report.tables import COMPONENTS, COSTS, ERRORS, FLOAT_FID, SHARES, Column

LAYERS = Column("layers on the engine", lambda record: record.quantized.get(EXECUTED), 3)
SIZE = Column("size, MB", lambda record: record.weights_bytes / 1e6, 2)
SAME_SHARE = 0.05  # largest difference between shares that count as the same
MIN_SEEDS = 3  # of a mean that is marked: fewer have no deviation to trust
DOMINANT_RATIO = 3  # of the greatest seed to the next, from which on it makes the mean its own
# pooled and spatial features of an evaluator: FID is of the first, sFID of the second
FEATURES = {"digits features": (64, 112), "Inception": (2048, 2023)}
NAMED = 4  # variants named in one sentence


class ScoreCell(NamedTuple):
    """A number of the table."""

    mean: float | None  # None where nothing was measured
    text: str
    spread: str
    mark: str = ""  # "best" of the same bits and coverage; "close" where one deviation cannot tell the best ones apart
    seeds: str = ""  # the value of every seed, to look up; empty where all print the same
    dominant: int | None = None  # the seed that makes the mean its own


Lines = list[tuple[Variant, list[ScoreCell]]]  # of a group's table: a cell for every variant and column


def measured_scores(group: Group) -> list[Column]:
    """Scores of images that some variant has."""
    return _measured(group, tables.score_columns((*tables.SCORES, *tables.MORE_SCORES), group.first.evaluator["name"]))


def _measured(group: Group, columns: Sequence[Column]) -> list[Column]:
    return [column for column in columns if any(column.read(record) is not None for record in group.records)]


def score_table(group: Group) -> tuple[list[Column], Lines]:
    """Columns and lines of the table of a group; columns without any number are left out."""
    before, after = (
        _measured(group, columns) for columns in ((*SHARES, LAYERS), (*ERRORS, FLOAT_FID, *COMPONENTS, SIZE, *COSTS))
    )
    columns = [*before, *measured_scores(group), *after]
    lines: Lines = []
    for variant in group.variants:
        alike = [other for other in group.variants if (other.bits, other.engine) == (variant.bits, variant.engine)]
        rivals = [other for other in alike if _quantize_alike(variant, other)]
        lines.append((variant, [_cell(column, variant, rivals) for column in columns]))
    return columns, lines


def _shares(variant: Variant) -> list[float]:
    """Shares of what is integer or quantized, in the order of `SHARES`; what is not noted counts as nothing."""
    return [statistics.mean(column.read(record) or 0.0 for record in variant.records) for column in SHARES]


def _quantize_alike(first: Variant, second: Variant) -> bool:
    """Whether two variants quantize the same, but for a few layers."""
    return all(abs(a - b) <= SAME_SHARE for a, b in zip(_shares(first), _shares(second), strict=True))


def _is_dominated(values: Iterable[float]) -> bool:
    """Whether one of three or more seeds makes the mean its own: an outlier upwards."""
    ranked = sorted(values)
    return len(ranked) >= MIN_SEEDS and ranked[-1] > DOMINANT_RATIO * ranked[-2] > 0


def _cell(column: Column, variant: Variant, rivals: Sequence[Variant]) -> ScoreCell:
    """Mean and sample deviation, and their rank among the rivals, which include the variant itself."""
    values = {record.seed: value for record in variant.records if (value := column.read(record)) is not None}
    if not values:
        return ScoreCell(None, "–", "")
    own = list(values.values())
    text, plus_minus, spread = tables.cell(own, column.digits).partition(" ± ")
    mark = _mark(column.better, own, [found for rival in rivals if (found := rival.values(column.read))])
    seeds = ", ".join(f"seed {seed}: {value:.{column.digits}f}" for seed, value in values.items()) if spread else ""
    dominant = max(values, key=lambda seed: values[seed]) if column.better and _is_dominated(own) else None
    return ScoreCell(statistics.mean(own), text, plus_minus.lstrip() + spread, mark, seeds, dominant)


def _mark(better: str, own: Sequence[float], rivals: Sequence[Sequence[float]]) -> str:
    """Best or close to it; empty with too few seeds, where one seed makes the mean, or with nothing to compare with."""
    if not better or len(rivals) < 2:
        return ""
    leader = (min if better == "↓" else max)(rivals, key=statistics.mean)
    if min(len(leader), len(own)) < MIN_SEEDS or _is_dominated(own) or _differ(leader, own):
        return ""
    near = [rival for rival in rivals if not (_is_dominated(rival) or _differ(leader, rival))]
    return "close" if len(near) > 1 or _is_dominated(leader) else "best"


def _differ(first: Sequence[float], second: Sequence[float]) -> bool:
    """Whether the means differ by more than either's deviation."""
    deviation = max(statistics.stdev(values) if len(values) > 1 else 0.0 for values in (first, second))
    return abs(statistics.mean(first) - statistics.mean(second)) > deviation


def warnings(group: Group, columns: Sequence[Column], lines: Lines) -> Iterator[str]:
    """Sentences on numbers that are not comparable, or not trustworthy; none without any objection."""
    runs = {run.folder: run for variant in group.variants for run in variant.runs}
    if smoke := sum(run.is_smoke for run in runs.values()):
        yield f"{smoke} of {len(runs)} runs were made with debug=smoke, to see that they run: such numbers mean nothing."
    first, evaluator = group.first, group.first.evaluator
    widths = dict(zip(("FID", "sFID"), FEATURES.get(evaluator_family(evaluator["name"]), ()), strict=False))
    counts = {"generated": first.protocol.get("images"), "reference": evaluator.get("reference_images")}
    for kind, images in counts.items():
        if short := [f"{s} ({n} features)" for s, n in widths.items() if isinstance(images, int) and images <= n]:
            yield (
                f"{images} {kind} images are too few for {' and '.join(short)}: a covariance of no more images than features "
                "is singular, and the distance says little."
            )
    if few := sum(len(variant.records) < MIN_SEEDS for variant in group.quantized):
        yield (
            f"{few} of {len(group.quantized)} lines have fewer than {MIN_SEEDS} seeds: what their means differ by may be "
            "chance, and none of them is marked as best."
        )
    if made := tables.devices(group.records):  # they sum in other orders, and take other times
        yield f"Lines and seeds here were {made}: their numbers differ in the last digits for that alone, their times wholly."
    different = {bits: text for bits, variants in group.bits.items() if (text := _different_shares(variants))}
    for text, bits in group_by(different, lambda each: different[each]).items():
        yield f"Lines of {', '.join(bits)} quantize different things, and are compared with their like alone: {text}."
    for i, column in enumerate(columns):
        if found := [f"{each.name} ({cells[i].seeds})" for each, cells in lines if cells[i].dominant is not None]:
            yield f"{column.title}: one seed makes the mean its own, marked † below: {_some(found)}."


def _different_shares(variants: Sequence[Variant]) -> str:
    """Variants of the same bits with what they quantize, the largest kind first; empty where all quantize the same."""
    kinds: list[list[Variant]] = []
    for variant in variants:
        same = next((kind for kind in kinds if _quantize_alike(kind[0], variant)), [])
        kinds += [] if same else [same]
        same.append(variant)
    texts: list[str] = []
    for kind in sorted(kinds, key=len, reverse=True):
        weights, macs, outputs = _shares(kind[0])
        texts.append(
            f"{_some([variant.label for variant in kind])} with {weights:.3f} of the weights and {macs:.3f} of the MACs "
            f"integer, {outputs:.3f} of the outputs quantized"
        )
    return "; ".join(texts) if len(texts) > 1 else ""


def _some(names: Sequence[str]) -> str:
    more = len(names) - NAMED
    return ", ".join(names[:NAMED]) + (f" and {more} more" if more > 0 else "")

"""Warnings shown above a table: numbers that are not comparable, or not trustworthy."""

from collections.abc import Iterator, Sequence

from tfmq_exp.report.comparability import group_by
from tfmq_exp.report.html.grouping import Group, Variant
from tfmq_exp.report.html.run_reader import Run
from tfmq_exp.report.html.score_ranking import MIN_SEEDS, ScoreTable, quantize_alike, quantized_shares
from tfmq_exp.report.protocol_match import evaluator_family
from tfmq_exp.report.tables import devices

# pooled and spatial features of an evaluator: FID is of the first, sFID of the second
FEATURES = {"digits features": (64, 112), "Inception": (2048, 2023)}
NAMED = 4  # variants named in one sentence


def is_smoke(run: Run) -> bool:
    """Whether a run was made with `debug=smoke`, to see that it runs."""
    return run.choices.get("runtime") == "smoke" or "debug=smoke" in str(run.environment.get("command", "")).split()


def warnings(group: Group, table: ScoreTable) -> list[str]:
    """Sentences for the reader; none without any objection."""
    checks = (_smoke, _few_images, _few_seeds, _devices, _different_shares)
    return [*(text for check in checks for text in check(group)), *_dominated(table)]


def _smoke(group: Group) -> Iterator[str]:
    runs = {run.folder: run for variant in group.variants for run in variant.runs}
    if smoke := sum(map(is_smoke, runs.values())):
        yield f"{smoke} of {len(runs)} runs were made with debug=smoke, to see that they run: such numbers mean nothing."


def _few_images(group: Group) -> Iterator[str]:
    """A covariance of as few images as features is singular, and FID grows with every direction that it lacks."""
    widths = zip(("FID", "sFID"), FEATURES.get(evaluator_family(group.first.evaluator["name"]), ()), strict=False)
    features = dict(widths)
    numbers = {
        "generated": group.first.protocol.get("images"),
        "reference": group.first.evaluator.get("reference_images"),
    }
    for kind, images in numbers.items():
        short = [
            f"{s} ({width} features)" for s, width in features.items() if isinstance(images, int) and images <= width
        ]
        if short:
            yield (
                f"{images} {kind} images are too few for {' and '.join(short)}: a covariance of no more images than features "
                "is singular, and the distance says little."
            )


def _few_seeds(group: Group) -> Iterator[str]:
    if few := sum(len(variant.members) < MIN_SEEDS for variant in group.quantized):
        yield (
            f"{few} of {len(group.quantized)} lines have fewer than {MIN_SEEDS} seeds: what their means differ by may be "
            "chance, and none of them is marked as best."
        )


def _devices(group: Group) -> Iterator[str]:
    """Kinds of devices sum in other orders, and take other times."""
    if made := devices(group.records):
        yield f"Lines and seeds here were {made}: their numbers differ in the last digits for that alone, their times wholly."


def _different_shares(group: Group) -> Iterator[str]:
    """Variants of the same bits that do not quantize the same; bits with the same text share a sentence."""
    texts: dict[str, str] = {}
    for bits in group.bits:
        kinds = _kinds([variant for variant in group.quantized if variant.bits == bits])
        if len(kinds) > 1:
            texts[bits] = "; ".join(map(_kind_text, kinds))
    for text, bits in group_by(texts, lambda each: texts[each]).items():
        yield f"Lines of {', '.join(bits)} quantize different things, and are compared with their like alone: {text}."


def _kinds(variants: Sequence[Variant]) -> list[list[Variant]]:
    """Variants that quantize the same together, the largest kind first."""
    kinds: list[list[Variant]] = []
    for variant in variants:
        same = next((kind for kind in kinds if quantize_alike(kind[0], variant)), None)
        if same is None:
            kinds.append([variant])
        else:
            same.append(variant)
    return sorted(kinds, key=len, reverse=True)


def _kind_text(variants: Sequence[Variant]) -> str:
    weights, macs, outputs = quantized_shares(variants[0])
    return (
        f"{_some([variant.label for variant in variants])} with {weights:.3f} of the weights and {macs:.3f} of the MACs "
        f"integer, {outputs:.3f} of the outputs quantized"
    )


def _dominated(table: ScoreTable) -> Iterator[str]:
    for i, column in enumerate(table.columns):
        found = [f"{each.name} ({cells[i].seeds})" for each, cells in table.rows if cells[i].dominant is not None]
        if found:
            yield f"{column.title}: one seed makes the mean its own, marked † below: {_some(found)}."


def _some(names: Sequence[str]) -> str:
    more = len(names) - NAMED
    return ", ".join(names[:NAMED]) + (f" and {more} more" if more > 0 else "")

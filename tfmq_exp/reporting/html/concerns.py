"""What forbids to believe a group's numbers, or to compare them: said before they are shown."""

from collections.abc import Iterator, Sequence

from tfmq_exp.report.html.runs import Run
from tfmq_exp.report.html.scores import SEEDS, ScoreTable, alike, coverage
from tfmq_exp.report.html.ways import Group, Way
from tfmq_exp.report.protocol_match import evaluator_family
from tfmq_exp.report.tables import devices

# pooled and spatial features of an evaluator: FID is of the first, sFID of the second
FEATURES = {"digits features": (64, 112), "Inception": (2048, 2023)}
NAMED = 4  # lines named in one sentence


def concerns(group: Group, table: ScoreTable) -> tuple[str, ...]:
    """Sentences for the reader; none where there is nothing to object to."""
    return (
        *_smoke(group),
        *_few_images(group),
        *_few_seeds(group),
        *_devices(group),
        *_coverage(group),
        *_dominated(table),
    )


def is_smoke(run: Run) -> bool:
    """Whether a run was made to see that it runs: `runtime=smoke`."""
    return run.chosen.get("runtime") == "smoke" or "runtime=smoke" in str(run.environment.get("command", "")).split()


def _smoke(group: Group) -> Iterator[str]:
    runs = {member.run.folder: member.run for way in group.ways for member in way.members}
    if smoke := sum(map(is_smoke, runs.values())):
        yield f"{smoke} of {len(runs)} runs were made with runtime=smoke, to see that they run: such numbers mean nothing."


def _few_images(group: Group) -> Iterator[str]:
    """A covariance of as few images as features is singular, and FID grows with every direction that it lacks."""
    widths = FEATURES.get(evaluator_family(str(group.evaluator["name"])))
    if widths is None:
        return
    for what, images in (
        ("generated", group.protocol.get("images")),
        ("reference", group.evaluator.get("reference_images")),
    ):
        scores = [f"{score} ({width} features)" for score, width in zip(("FID", "sFID"), widths, strict=True)]
        short = [
            score for score, width in zip(scores, widths, strict=True) if isinstance(images, int) and images <= width
        ]
        if short:
            yield (
                f"{images} {what} images are too few for {' and '.join(short)}: a covariance of no more images than features "
                "is singular, and the distance says little."
            )


def _few_seeds(group: Group) -> Iterator[str]:
    few = [way for way in group.quantized if len(way.members) < SEEDS]
    if few:
        yield (
            f"{len(few)} of {len(group.quantized)} lines have fewer than {SEEDS} seeds: what their means differ by may be chance, "
            "and none of them is marked as best."
        )


def _devices(group: Group) -> Iterator[str]:
    """Kinds of devices sum in other orders, and take other times."""
    if made := devices([record for way in group.ways for record in way.records]):
        yield f"Lines and seeds here were {made}: their numbers differ in the last digits for that alone, their times wholly."


def _coverage(group: Group) -> Iterator[str]:
    """Lines of the same bits that do not quantize the same; bits of which the same is to be said share a sentence."""
    said: dict[str, list[str]] = {}
    for bits in group.bits:
        kinds = _kinds([way for way in group.quantized if way.bits == bits])
        if len(kinds) > 1:
            said.setdefault("; ".join(_kind(ways) for ways in kinds), []).append(bits)
    for text, bits in said.items():
        yield f"Lines of {', '.join(bits)} quantize different things, and are compared with their like alone: {text}."


def _kinds(ways: Sequence[Way]) -> list[list[Way]]:
    """Ways that quantize the same together, the largest kind first."""
    kinds: list[list[Way]] = []
    for way in ways:
        same = next((kind for kind in kinds if alike(coverage(kind[0]), coverage(way))), None)
        if same is None:
            kinds.append([way])
        else:
            same.append(way)
    return sorted(kinds, key=lambda kind: -len(kind))


def _kind(ways: Sequence[Way]) -> str:
    weights, macs, outputs = coverage(ways[0])
    return (
        f"{_some([way.label for way in ways])} with {weights:.3f} of the weights and {macs:.3f} of the MACs integer, "
        f"{outputs:.3f} of the outputs quantized"
    )


def _dominated(table: ScoreTable) -> Iterator[str]:
    for i, column in enumerate(table.columns):
        found = [
            f"{line.way.bits} {line.way.label} ({line.cells[i].seeds})"
            for line in table.lines
            if line.cells[i].dominated is not None
        ]
        if found:
            yield f"{column.title}: one seed makes the mean its own, marked † below: {_some(found)}."


def _some(names: Sequence[str]) -> str:
    more = len(names) - NAMED
    return ", ".join(names[:NAMED]) + (f" and {more} more" if more > 0 else "")

"""Tables of images against the float model's: each network's distances, and methods against each other, image by image."""

import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import NamedTuple

from tfmq_exp.report.comparability import FLOAT, bits_order, comparison_key, engine_of, group_by, names
from tfmq_exp.report.image_distances import (
    DISTANCES,
    DISTANCES_FILE,
    FLOAT_AGAIN,
    QUANTIZED,
    Values,
    read_distances,
    summarize,
)
from tfmq_exp.report.paired_statistics import PairedDifference, compare_pairs
from tfmq_exp.report.records import ScoreRecord, read_file

PAIRED_HEADER = ("bits", "method", "less", "mean difference", "95 % interval", "p", "verdict", "seeds", "images")
SHOWN = ("q05", "q50", "q95")  # quantiles in tables
Table = tuple[list[str], list[list[str]]]


@dataclass(frozen=True)
class NetworkImages:
    """Distances of one network's images, or of float images that are made once more, by seed of the run."""

    bits: str
    label: str
    seeds: dict[int, Values] = field(default_factory=dict)
    floor: bool = False  # float against float

    @property
    def name(self) -> str:
        return f"{self.bits} {self.label}".strip()

    def pooled(self, distance: str) -> list[float]:
        """The values of all images of all seeds."""
        return [value for values in self.seeds.values() for value in values.get(distance, ())]


class Member(NamedTuple):
    """A record with the distances of its images."""

    record: ScoreRecord
    network: str  # as the file of distances calls it
    values: Values


def read_members(*sources: Path) -> Iterator[Member]:
    """Records below folders whose run folders have distances of images; ValueError for a damaged file."""
    for path in chain(*(sorted(source.rglob("results.json")) for source in sources if source.is_dir())):
        if (file := path.with_name(DISTANCES_FILE)).is_file():
            yield from members_of(read_file(path), file)


def members_of(records: Sequence[ScoreRecord], file: Path) -> Iterator[Member]:
    """The records of a run with the networks of its file of distances; the float record has those of float images."""
    found = read_distances(file)
    for record in records:
        own = engine_of(record) or QUANTIZED
        for network, values in found.items():
            if network.startswith(FLOAT_AGAIN) if record.method == FLOAT else network == own:
                yield Member(record, network, values)


def networks_of(members: Sequence[Member]) -> list[list[NetworkImages]]:
    """Networks that may be compared, one list for each protocol: float images first, then more bits; the last run of a seed counts."""
    tables: list[list[NetworkImages]] = []
    for same in group_by(members, lambda member: comparison_key(member.record)).values():
        found: dict[tuple[str, str], NetworkImages] = {}
        for member, name in zip(same, names([member.record for member in same]), strict=True):
            floor = member.record.method == FLOAT
            key = member.record.quant, member.network if floor else name
            found.setdefault(key, NetworkImages(*key, floor=floor)).seeds[member.record.seed] = member.values
        order = sorted(found.values(), key=lambda each: (not each.floor, bits_order(each.bits), each.label))
        tables.append(order)
    return tables


def distances_in(networks: Sequence[NetworkImages]) -> list[str]:
    """Distances that some network has, in the order of tables."""
    return [name for name in DISTANCES if any(network.pooled(name) for network in networks)]


def distance_table(networks: Sequence[NetworkImages]) -> Table:
    """Mean over all images, and in brackets the quantiles of 5, 50 and 95 %."""
    columns = distances_in(networks)
    headings = [f"{DISTANCES[name].title} {DISTANCES[name].better}" for name in columns]
    rows = [
        [each.bits, each.label, *(spread(each.pooled(name), DISTANCES[name].digits) for name in columns), _counts(each)]
        for each in networks
    ]
    return _without_empty_bits(["bits", "method", *headings, "images"], rows)


def spread(values: Sequence[float], digits: int) -> str:
    """Mean and quantiles of some values; a dash without any."""
    if not values:
        return "–"
    found = summarize({"": values})[""]
    return f"{found['mean']:.{digits}f} ({', '.join(f'{found[name]:.{digits}f}' for name in SHOWN)})"


def _counts(network: NetworkImages) -> str:
    return str(max((len(network.pooled(name)) for name in DISTANCES), default=0))


class PairedRow(NamedTuple):
    """A network less the reference in one distance."""

    network: NetworkImages
    reference: NetworkImages
    found: PairedDifference
    agreeing: int  # seeds whose own mean difference has the side of all
    seeds: int  # that both have


def paired_rows(networks: Sequence[NetworkImages], distance: str, against: str | None = None) -> list[PairedRow]:
    """Compare quantized networks on the images that they have in common: same seed, same index.

    Args:
        networks: of one protocol.
        distance: a name of `DISTANCES`.
        against: name or label of the reference; None for the best mean of the same bits.

    Raises:
        ValueError: an unknown distance, or a reference that is not there.
    """
    if distance not in DISTANCES:
        raise ValueError(f"distance must be one of {', '.join(DISTANCES)}, got {distance!r}")
    quantized = [each for each in networks if not each.floor and each.pooled(distance)]
    rows: list[PairedRow] = []
    for same in group_by(quantized, lambda each: "" if against else each.bits).values():
        reference = _reference(same, distance, against)
        for each in same:
            pairs = _pairs(each, reference, distance)
            if each is reference or sum(len(first) for first, _ in pairs.values()) < 2:
                continue
            first, second = ([value for pair in pairs.values() for value in pair[side]] for side in (0, 1))
            found = compare_pairs(first, second, DISTANCES[distance].better)
            means = [statistics.mean(one) - statistics.mean(other) for one, other in pairs.values()]
            agreeing = sum(mean * found.mean > 0 for mean in means)
            rows.append(PairedRow(each, reference, found, agreeing, len(pairs)))
    return rows


def _reference(networks: Sequence[NetworkImages], distance: str, against: str | None) -> NetworkImages:
    if against:
        known = {name: each for each in networks for name in (each.label, each.name)}
        if against not in known:
            raise ValueError(
                f"no images of {against!r}; there are those of {', '.join(each.name for each in networks)}"
            )
        return known[against]
    best = max if DISTANCES[distance].better == "↑" else min
    return best(networks, key=lambda each: statistics.mean(each.pooled(distance)))


def _pairs(
    first: NetworkImages, second: NetworkImages, distance: str
) -> dict[int, tuple[Sequence[float], Sequence[float]]]:
    """Values of the images that both have, by seed; images of a seed are counted from the first."""
    found: dict[int, tuple[Sequence[float], Sequence[float]]] = {}
    for seed in sorted(first.seeds.keys() & second.seeds.keys()):
        one, other = (each.seeds[seed].get(distance, ()) for each in (first, second))
        if count := min(len(one), len(other)):
            found[seed] = one[:count], other[:count]
    return found


def paired_table(networks: Sequence[NetworkImages], distance: str, against: str | None = None) -> Table:
    """Rows of `paired_rows` as text."""
    digits, rows = DISTANCES[distance].digits, paired_rows(networks, distance, against)
    lines = [
        [
            *(row.network.bits, row.network.label, row.reference.name),
            f"{row.found.mean:+.{digits}f}",
            f"{row.found.low:+.{digits}f} to {row.found.high:+.{digits}f}",
            f"{row.found.p:.2g}",
            row.found.text,
            f"{row.agreeing} of {row.seeds} alike",
            str(row.found.images),
        ]
        for row in rows
    ]
    return _without_empty_bits(list(PAIRED_HEADER), lines)


def _without_empty_bits(header: list[str], rows: list[list[str]]) -> Table:
    """Leave out the first column where no network has bits, as those of any folders have none."""
    start = 0 if any(row[0] for row in rows) else 1
    return header[start:], [row[start:] for row in rows]


def summary_of(networks: Sequence[NetworkImages], against: str | None = None) -> dict[str, Mapping[str, object]]:
    """Summaries and paired differences as plain JSON data."""
    distances = distances_in(networks)
    pairs = {name: paired_rows(networks, name, against) for name in distances}
    return {
        "networks": {
            each.name: summarize({name: values for name in distances if (values := each.pooled(name))})
            for each in networks
        },
        "paired": {
            name: [{"method": r.network.name, "less": r.reference.name, **r.found._asdict()} for r in rows]
            for name, rows in pairs.items()
        },
    }

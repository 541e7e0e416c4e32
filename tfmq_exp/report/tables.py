"""Score tables: mean and standard deviation over seeds, one row for every variant of quantization."""

import csv
import io
import statistics
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from tfmq_exp.report import comparability
from tfmq_exp.report.comparability import EXECUTED, FLOAT, bits_order, engine_of, group_by, join, names, one_per_seed
from tfmq_exp.report.image_distances import DISTANCES
from tfmq_exp.report.records import ScoreRecord

FORMATS = ("markdown", "csv")
Reader = Callable[[ScoreRecord], float | None]


class Column(NamedTuple):
    """A column of numbers."""

    title: str
    read: Reader
    digits: int
    better: str = ""  # an arrow to the better side; empty where there is none
    evaluator: str = ""  # whose score of images it is; empty for other numbers

    @property
    def heading(self) -> str:
        """The title with evaluator and arrow."""
        return " ".join(filter(None, (self.title, self.evaluator and f"({self.evaluator})", self.better)))


def _entry(part: str, name: str) -> Reader:
    return lambda record: getattr(record, part).get(name)


def _costs(record: ScoreRecord, kind: str) -> list[float]:
    return [record.cost[name] for name in (f"weight_{kind}", f"activation_{kind}") if name in record.cost]


# name of a score of images, title, decimals, arrow: those of every evaluator, and those that only some have
SCORES = (("fid", "FID", 3, "↓"), ("sfid", "sFID", 3, "↓"), ("is", "IS", 2, "↑"))
MORE_SCORES = (
    *(("kid", "KID", 5, "↓"), ("precision", "precision", 3, "↑")),
    *(
        ("recall", "recall", 3, "↑"),
        ("clip", "CLIP", 3, "↑"),
        ("clip_iqa", "CLIP-IQA", 4, "↑"),
        ("cmmd", "CMMD", 4, "↓"),
    ),
    *(("image_reward", "ImageReward", 3, "↑"), ("hpsv2", "HPSv2", 2, "↑"), ("pick_score", "PickScore", 3, "↑")),
)
ERRORS = (
    Column("temporal error", _entry("errors", "temporal_relative_mse"), 5, "↓"),
    Column("step error", _entry("errors", "step"), 5, "↓"),
    Column("trajectory error", _entry("errors", "trajectory"), 4, "↓"),
    Column("PSNR, dB", _entry("errors", "psnr"), 1, "↑"),
)
FLOAT_FID = Column("FID to float images", _entry("errors", "float_fid"), 3, "↓")
# of images from the float model's, as means over images; columns that no record has are left out
IMAGE_ERRORS = (
    *(Column(e.title, _entry("errors", e.name), e.digits, e.better) for e in DISTANCES.values() if e.name != "psnr"),
    FLOAT_FID,
)
COMPONENTS = (  # of components beside the denoiser, where some are quantized
    Column("decoder PSNR, dB", _entry("errors", "decoder_psnr"), 1, "↑"),
    Column("text error", _entry("errors", "text_error"), 4, "↓"),
    Column("text cosine", _entry("errors", "text_cosine"), 5, "↑"),
)
SHARES = (
    Column("weights integer", _entry("quantized", "weight_share"), 3),
    Column("MACs integer", _entry("quantized", "mac_share_weights_and_inputs"), 3),
    Column("outputs quantized", _entry("quantized", "mac_share_outputs"), 3),
)
COSTS = (
    Column("samples", lambda record: max(_costs(record, "samples"), default=None), 0),
    Column("iterations", lambda record: sum(costs) if (costs := _costs(record, "iterations")) else None, 0),
    Column("size / fp32", _entry("cost", "size_ratio"), 3),
    Column("quantization, s", _entry("cost", "quantization_seconds"), 0),
)


def score_columns(scores: Iterable[tuple[str, str, int, str]], evaluator: str) -> list[Column]:
    """Columns of scores of images: of `SCORES`, `MORE_SCORES`, or both."""
    return [Column(title, _entry("scores", name), digits, better, evaluator) for name, title, digits, better in scores]


def cell(values: Iterable[float | None], digits: int) -> str:
    """`mean ± sample deviation` of the present values, the mean alone where all print the same, a dash without any."""
    present = [value for value in values if value is not None]
    if len({f"{value:.{digits}f}" for value in present}) > 1:
        return f"{statistics.mean(present):.{digits}f} ± {statistics.stdev(present):.{digits}f}"
    return f"{statistics.mean(present):.{digits}f}" if present else "–"


def executed_dtypes(executed: Iterable[str]) -> str:
    """The formats that an engine multiplies layers in; int8 is called integers, `float` is what it leaves out."""
    found = sorted(set(executed) - {"float"})
    return "integers" if found in ([], ["int8"]) else ", ".join(found)


def execution(records: Sequence[ScoreRecord]) -> str:
    """Execution of the quantized rows among these, for a headline: simulated, by an engine, or both."""
    rows = [record for record in records if record.method != FLOAT]
    deployed = [record for record in rows if engine_of(record)]
    if not deployed:
        return "simulated quantization"
    shares = [share for record in deployed if (share := record.quantized.get(EXECUTED)) is not None]
    ends = dict.fromkeys(f"{share:.0%}" for share in (min(shares), max(shares))) if shares else ()
    layers = f" ({' to '.join(ends)} of their layers)" if ends else ""
    engines = " or ".join(sorted({engine_of(record) for record in deployed}))
    dtypes = executed_dtypes(dtype for record in deployed for dtype in record.quantized.get("executed_in", ()))
    simulated = "" if len(deployed) == len(rows) else "simulated quantization; rows "
    return f"{simulated}executed by {engines} in {dtypes}{layers}"


def devices(records: Sequence[ScoreRecord]) -> str:
    """Devices of the records, for a headline; empty for fewer than two kinds."""
    found = sorted({str(record.environment["device"]) for record in records if "device" in record.environment})
    return f"made on {' and '.join(found)}" if len(found) > 1 else ""


def by_protocol(records: Sequence[ScoreRecord]) -> list[list[ScoreRecord]]:
    """Records that may share a table."""
    return list(group_by(records, comparability.comparison_key).values())


def titles(groups: Sequence[Sequence[ScoreRecord]]) -> list[str]:
    """Titles of the groups of `by_protocol`: the protocols, in words that differ."""
    first = [group[0] for group in groups]
    plain = [
        f"{record.model}, {comparability.sampling_title(record)}, {comparability.scored_by(record)}" for record in first
    ]
    return list(map(join, plain, comparability.distinctions(first, plain)))


def headline(title: str, shown: Sequence[ScoreRecord]) -> str:
    """A title with how the records in a table were computed, and where."""
    return join(title, execution(shown), devices(shown))


def table(records: Sequence[ScoreRecord]) -> tuple[list[str], list[list[str]]]:
    """Header and rows; records of one protocol and one evaluator, float rows first.

    Raises:
        ValueError: no records, or records that were made under different protocols.
    """
    if (protocols := len(by_protocol(records))) != 1:
        raise ValueError(f"{protocols} different protocols in one table; use `by_protocol` first")
    found = [c for c in (*IMAGE_ERRORS, *COMPONENTS) if any(c.read(record) is not None for record in records)]
    columns = [*score_columns(SCORES, records[0].evaluator["name"]), *ERRORS, *found, *SHARES, *COSTS]
    named = zip(records, names(records), strict=True)
    groups = group_by(named, lambda pair: (pair[0].method != FLOAT, pair[0].quant, pair[1]))
    rows = []
    for key in sorted(groups, key=lambda key: (key[0], bits_order(key[1]), key)):
        members, left_out = one_per_seed([record for record, _ in groups[key]])
        numbers = [cell([column.read(record) for record in members], column.digits) for column in columns]
        rows.append([*key[1:], *numbers, f"{len(members)}{left_out}"])
    return ["bits", "method", *[column.heading for column in columns], "seeds"], rows


def pivot(records: Sequence[ScoreRecord], score: str, methods: Sequence[str]) -> tuple[list[str], list[list[str]]]:
    """One score or error with a row for each pair of bits and a column for each label, as papers print ablations.

    Records are of one protocol; columns are in the order of the methods, each of which brings all of its labels.

    Raises:
        ValueError: a method without records, or a score or error that none has.
    """
    named = list(zip(records, names(records), strict=True))
    labels = group_by(named, lambda pair: pair[0].method)
    if missing := [method for method in methods if method not in labels]:
        raise ValueError(f"no results of {', '.join(missing)}; there are {', '.join(sorted(labels))}")
    known = {name: None for record in records for name in (*sorted(record.scores), *sorted(record.errors))}
    if score not in known:
        raise ValueError(f"no record has the score or error {score!r}; there are {', '.join(known)}")
    columns = [name for method in methods for name in sorted({name for _, name in labels[method]})]
    digits = 3 if any(score in record.scores for record in records) else 4

    def mean(quant: str, column: str) -> str:
        members, left_out = one_per_seed([record for record, name in named if (record.quant, name) == (quant, column)])
        return cell([record.scores.get(score, record.errors.get(score)) for record in members], digits) + left_out

    quants = sorted({record.quant for record in records if record.method in methods}, key=bits_order)
    return ["bits", *columns], [[quant, *(mean(quant, column) for column in columns)] for quant in quants]


def render(header: Sequence[str], rows: Sequence[Sequence[str]], format_name: str) -> str:
    """The table as text.

    Raises:
        ValueError: an unknown format.
    """
    if format_name == "csv":
        buffer = io.StringIO()
        csv.writer(buffer, lineterminator="\n").writerows([header, *rows])
        return buffer.getvalue()
    if format_name == "markdown":
        return "".join(f"| {' | '.join(row)} |\n" for row in (header, ["---"] * len(header), *rows))
    raise ValueError(f"format must be one of {', '.join(FORMATS)}, got {format_name!r}")

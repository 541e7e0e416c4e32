"""Columns of score tables: what is read off a record, and how it is printed."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from tfmq_exp.report.records import ScoreRecord

Reader = Callable[[ScoreRecord], float | None]


@dataclass(frozen=True)
class Column:
    """A column of numbers.

    Args:
        title: what it shows.
        read: the number of a record.
        digits: decimals.
        better: an arrow to the better side; empty where there is none.
        evaluator: whose score of images it is; empty for other numbers.
    """

    title: str
    read: Reader
    digits: int
    better: str = ""
    evaluator: str = ""

    @property
    def heading(self) -> str:
        """The title with evaluator and arrow."""
        return " ".join(filter(None, (self.title, self.evaluator and f"({self.evaluator})", self.better)))


# name of a score of images, title, decimals, arrow: those of every evaluator, and those that only some have
SCORES = (("fid", "FID", 3, "↓"), ("sfid", "sFID", 3, "↓"), ("is", "IS", 2, "↑"))
MORE_SCORES = (
    ("kid", "KID", 5, "↓"),
    ("precision", "precision", 3, "↑"),
    ("recall", "recall", 3, "↑"),
    ("clip", "CLIP", 3, "↑"),
)
ERRORS = (
    Column("temporal error", lambda record: record.errors.get("temporal_relative_mse"), 5, "↓"),
    Column("trajectory error", lambda record: record.errors.get("trajectory"), 4, "↓"),
)
SHARES = (
    Column("weights integer", lambda record: record.quantized.get("weight_share"), 3),
    Column("MACs integer", lambda record: record.quantized.get("mac_share_weights_and_inputs"), 3),
    Column("outputs quantized", lambda record: record.quantized.get("mac_share_outputs"), 3),
)
COSTS = (
    Column("samples", lambda record: max(_costs(record, "samples"), default=None), 0),
    Column("iterations", lambda record: sum(costs) if (costs := _costs(record, "iterations")) else None, 0),
    Column("size / fp32", lambda record: record.cost.get("size_ratio"), 3),
    Column("quantization, s", lambda record: record.cost.get("quantization_seconds"), 0),
)


def score_columns(scores: Iterable[tuple[str, str, int, str]], evaluator: str) -> list[Column]:
    """Columns of scores of images: of `SCORES`, `MORE_SCORES`, or both."""

    def reader(name: str) -> Reader:
        return lambda record: record.scores.get(name)

    return [Column(title, reader(name), digits, better, evaluator) for name, title, digits, better in scores]


def _costs(record: ScoreRecord, kind: str) -> list[float]:
    return [record.cost[name] for name in (f"weight_{kind}", f"activation_{kind}") if name in record.cost]

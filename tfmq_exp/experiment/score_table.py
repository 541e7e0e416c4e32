"""The table of scores at the end of a run."""

import json
import logging
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from tfmq_exp.reporting import tables
from tfmq_exp.reporting.records import ScoreRecord

log = logging.getLogger(__name__)


def show(records: Sequence[ScoreRecord], console: Console) -> None:
    """One column for each way of quantizing: it fits 80 characters."""
    record = records[0]
    title = f"{record.model}, {record.protocol['images']} images, seed {record.seed}, {tables.execution(records)}"
    header, rows = tables.table(records)
    view = Table(title=title, title_justify="left")
    for name in ("", *(f"{row[0]} {row[1]}" for row in rows)):
        view.add_column(name, justify="right" if name else "left")
    for i, name in enumerate(header):
        if name not in ("bits", "method", "seeds"):
            view.add_row(name, *(row[i] for row in rows))
    view.add_row("weights, kB", *(f"{record.weights_bytes / 1e3:.0f}" for record in records))
    console.print(view)
    log.debug("results %s", json.dumps([record.scores for record in records]))

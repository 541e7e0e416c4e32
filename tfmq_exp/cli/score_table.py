"""Tables of scores at the end of a run and of a sweep, in whatever width there is. Nothing in them is cut off."""

import json
import logging
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path

from rich.cells import cell_len
from rich.console import Console
from rich.table import Table

from tfmq_exp.cli.terminal import say, visible
from tfmq_exp.core.files import write_atomically
from tfmq_exp.report import tables
from tfmq_exp.report.records import ScoreRecord

log = logging.getLogger(__name__)

Cells = Sequence[Sequence[str]]
NAMES = ("bits", "method", "seeds")
COSTS = ("samples", "iterations", "size / fp32", "quantization, s")
BORDER, WORD = 3, 12  # signs between two columns; letters of a heading that are kept together


def show(records: Sequence[ScoreRecord], console: Console) -> None:
    """The table of one run: a column for each way of quantizing, or one way below the other where they do not fit."""
    record = records[0]
    title = f"{record.model}, {record.protocol['images']} images, seed {record.seed}, {tables.execution(records)}"
    header, ways = tables.table(records)
    rows = [[name, *(way[i] for way in ways)] for i, name in enumerate(header) if name not in NAMES]
    rows.append(["weights, kB", *(f"{record.weights_bytes / 1e3:.0f}" for record in records)])
    headings = ["", *(visible(f"{way[0]} {way[1]}") for way in ways)]
    if fitting(headings, rows, 1, console.width) == len(headings):
        console.print(drawn(title, headings, rows, 1, console.width))
    else:
        stacked(title, headings, rows, console)
    log.debug("results %s", json.dumps([record.scores for record in records]))


def show_sweep(records: Sequence[ScoreRecord], folder: Path, console: Console) -> None:
    """The tables of a sweep, one for each protocol: a row for each way, over its seeds, with the scores that fit.

    Args:
        records: of all its jobs; there may be none.
        folder: of the sweep: `scores.md` there has every column.
        console: where the tables are shown.
    """
    if not records:
        return
    groups = tables.by_protocol(records)
    named = zip(tables.titles(groups), groups, strict=True)
    shown = [(tables.headline(title, group), tables.table(group)) for title, group in named]
    for title, (header, ways) in shown:
        order = [*NAMES, *(name for name in header if name not in (*NAMES, *COSTS))]
        rows = [[visible(way[header.index(name)]) for name in order] for way in ways]
        count = fitting(order, rows, 2, console.width)
        if count > len(NAMES):
            console.print(drawn(title, order[:count], [row[:count] for row in rows], 2, console.width))
        else:
            headings = ["", *(f"{row[0]} {row[1]}" for row in rows)]
            columns = [[name, *(row[i] for row in rows)] for i, name in enumerate(order) if i > 1]
            stacked(title, headings, columns, console)
    text = "\n".join(f"**{title}**\n\n{tables.render(*table, 'markdown')}" for title, table in shown)
    target = folder / "scores.md"
    write_atomically(target, lambda path: path.write_text(text, encoding="utf-8", errors="backslashreplace"))
    say(console, f"every column: {target}")


def narrowest(headings: Sequence[str], rows: Cells, names: int) -> list[int]:
    """Signs that each column needs: values stand in one line, headings and the first so many columns, names, fold."""
    words = [max((cell_len(word) for word in heading.split()), default=0) for heading in headings]
    cells = [max(map(cell_len, column)) for column in zip(*rows, strict=True)]
    return [
        max(min(word, WORD), min(cell, WORD) if i < names else cell)
        for i, (word, cell) in enumerate(zip(words, cells, strict=True))
    ]


def fitting(headings: Sequence[str], rows: Cells, names: int, width: int) -> int:
    """How many of the columns fit beside each other."""
    totals = [1 + size for size in accumulate(size + BORDER for size in narrowest(headings, rows, names))]
    return sum(total <= width for total in totals)


def drawn(title: str, headings: Sequence[str], rows: Cells, names: int, width: int) -> Table:
    """A table of columns that fit; those on the left are the first to get what room is left."""
    view = Table(title=title, title_justify="left")
    least = narrowest(headings, rows, names)
    spare = width - 1 - sum(size + BORDER for size in least)
    for i, (heading, size) in enumerate(zip(headings, least, strict=True)):
        most = max(cell_len(heading), *(cell_len(row[i]) for row in rows))
        taken = min(most - size, spare)
        spare -= taken
        view.add_column(heading, justify="left" if i < names else "right", overflow="fold", width=size + taken)
    for row in rows:
        view.add_row(*row)
    return view


def stacked(title: str, headings: Sequence[str], rows: Cells, console: Console) -> None:
    """Column after column, a line for each value: for any width."""
    say(console, title)
    for i, heading in enumerate(headings[1:], start=1):
        say(console, heading)
        for row in rows:
            say(console, f"  {row[0]}: {row[i]}")

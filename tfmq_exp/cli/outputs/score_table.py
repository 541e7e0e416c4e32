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
BORDER, WORD = 3, 12  # characters between two columns; those of a heading that stay in one line


def print_scores(records: Sequence[ScoreRecord], console: Console) -> None:
    """Print the table of one run: a column for each network, or one below the other where they do not fit."""
    record = records[0]
    title = f"{record.model}, {record.protocol['images']} images, seed {record.seed}, {tables.execution(records)}"
    header, networks = tables.table(records)
    rows = [[name, *(cells[i] for cells in networks)] for i, name in enumerate(header) if name not in NAMES]
    rows.append(["weights, kB", *(f"{record.weights_bytes / 1e3:.0f}" for record in records)])
    headings = ["", *(visible(f"{cells[0]} {cells[1]}") for cells in networks)]
    if fitting(headings, rows, 1, console.width) == len(headings):
        console.print(_drawn(title, headings, rows, 1, console.width))
    else:
        print_stacked(title, headings, rows, console)
    log.debug("results %s", json.dumps([record.scores for record in records]))


def print_sweep_scores(records: Sequence[ScoreRecord], folder: Path, console: Console) -> None:
    """Print the tables of a sweep, one for each protocol: a row for each network, over its seeds, with the scores that fit.

    `scores.md` in the sweep's folder has every column.
    """
    if not records:
        return
    groups = tables.by_protocol(records)
    named = zip(tables.titles(groups), groups, strict=True)
    shown = [(tables.headline(title, group), tables.table(group)) for title, group in named]
    for title, (header, networks) in shown:
        order = [*NAMES, *(name for name in header if name not in (*NAMES, *COSTS))]
        rows = [[visible(cells[header.index(name)]) for name in order] for cells in networks]
        count = fitting(order, rows, 2, console.width)
        if count > len(NAMES):
            console.print(_drawn(title, order[:count], [row[:count] for row in rows], 2, console.width))
        else:
            headings = ["", *(f"{row[0]} {row[1]}" for row in rows)]
            print_stacked(
                title, headings, [[name, *(row[i] for row in rows)] for i, name in enumerate(order) if i > 1], console
            )
    text = "\n".join(f"**{title}**\n\n{tables.render(*table, 'markdown')}" for title, table in shown)
    target = folder / "scores.md"
    write_atomically(target, lambda path: path.write_text(text, encoding="utf-8", errors="backslashreplace"))
    say(console, f"every column: {target}")


def least_widths(headings: Sequence[str], rows: Cells, names: int) -> list[int]:
    """Least width of each column: values stay in one line; headings and the first `names` columns, which are names, fold."""
    words = [max((cell_len(word) for word in heading.split()), default=0) for heading in headings]
    cells = [max(map(cell_len, column)) for column in zip(*rows, strict=True)]
    return [
        max(min(word, WORD), min(cell, WORD) if i < names else cell)
        for i, (word, cell) in enumerate(zip(words, cells, strict=True))
    ]


def fitting(headings: Sequence[str], rows: Cells, names: int, width: int) -> int:
    """Number of columns that fit next to each other."""
    totals = [1 + size for size in accumulate(size + BORDER for size in least_widths(headings, rows, names))]
    return sum(total <= width for total in totals)


def _drawn(title: str, headings: Sequence[str], rows: Cells, names: int, width: int) -> Table:
    """A table of columns that fit; the remaining width goes to those on the left first, of which `names` are names and may fold."""
    view = Table(title=title, title_justify="left")
    least = least_widths(headings, rows, names)
    spare = width - 1 - sum(size + BORDER for size in least)
    for i, (heading, size) in enumerate(zip(headings, least, strict=True)):
        most = max(cell_len(heading), *(cell_len(row[i]) for row in rows))
        taken = min(most - size, spare)
        spare -= taken
        view.add_column(heading, justify="left" if i < names else "right", overflow="fold", width=size + taken)
    for row in rows:
        view.add_row(*row)
    return view


def print_stacked(title: str, headings: Sequence[str], rows: Cells, console: Console) -> None:
    """Print column after column, a line for each value: for any width."""
    say(console, title)
    for i, heading in enumerate(headings[1:], start=1):
        say(console, heading)
        for row in rows:
            say(console, f"  {row[0]}: {row[i]}")

"""A comparison as markdown, with footnotes and a legend, or as CSV, with a column for every part of a cell."""

import statistics

from tfmq_exp.report.comparison import CHANGE, Cell, Comparison
from tfmq_exp.report.tables import render

NAMES = {
    "fid": "FID ↓",
    "sfid": "sFID ↓",
    "is": "IS ↑",
    "clip": "CLIP ↑",
    "precision": "precision ↑",
    "gpu_hours": "GPU hours ↓",
    "memory_mb": "memory, MB ↓",
    "size_mb": "size, MB ↓",
    "latency_s": "latency, s ↓",
    "speedup": "speed-up ↑",
}
# mark and meaning of `PublishedRow.verified`; capitals were seen where they are printed first
MARKS = {
    "poster": ("P", "the authors' poster"),
    "page": ("A", "the authors' page or abstract"),
    "supplement": ("S", "the paper's supplement"),
    "code": ("C", "the authors' code"),
    "full_text": ("T", "text of the paper that prints the row"),
    "image": ("I", "image of the table, from its authors"),
    "secondary": ("q", "quoted by others"),
    "secondary_notes": ("n", "reading notes, which a machine may have written"),
    "derived": ("d", "arithmetic on such numbers"),
    "memory": ("m", "from memory, unverified: no target"),
}
PARTS = ("paper", "verified", "ours", "std", "seeds", "difference", "notes")
NONE = "—"


def _digits(cell: Cell) -> int:
    """As many decimals as the paper prints, two at least; trailing zeros are not known."""
    printed = f"{cell.paper:.6f}".rstrip("0") if cell.paper is not None else ""
    return max(2, len(printed.partition(".")[2]))


def _parts(cell: Cell) -> tuple[str, str, str, str, str]:
    """Paper, ours, standard deviation, seeds, difference; empty where there is none."""
    digits = _digits(cell)
    paper = "" if cell.paper is None else f"{cell.paper:.{digits}f}"
    if cell.spread is not None:
        paper += f" ± {cell.spread:.2f}"
    if not cell.ours:
        return paper, "", "", "", ""
    mean = f"{statistics.mean(cell.ours):.{digits}f}"
    deviation = f"{statistics.stdev(cell.ours):.{digits}f}" if len(cell.ours) > 1 else ""
    difference = "" if cell.difference is None else f"{cell.difference:+.{digits}f}"
    return paper, mean, deviation, str(len(cell.ours)), difference


def _title(column: tuple[str, str]) -> str:
    model, score = column
    plain = score.removeprefix(CHANGE)
    return f"{model} {CHANGE if plain != score else ''}{NAMES[plain]}"


def as_csv(comparison: Comparison) -> str:
    """One line for every way of quantizing; numbers alone in their columns."""
    header = [f"{_title(column)} {part}" for column in comparison.columns for part in PARTS]
    rows: list[list[str]] = []
    for bits, method, cells in comparison.lines:
        row = [bits, method]
        for cell in cells:
            paper, *ours = _parts(cell)
            row += [paper, cell.verified, *ours, "; ".join(cell.notes)]
        rows.append(row)
    return render(["bits", "method", *header], rows, "csv")


def as_markdown(comparison: Comparison) -> str:
    """A title, the table, numbered footnotes, and what the marks mean."""
    numbers: dict[str, int] = {}

    def text(cell: Cell) -> str:
        if cell.paper is None and not cell.ours:
            return NONE
        paper, mean, deviation, seeds, difference = _parts(cell)
        spread = f" ± {deviation}" if deviation else ""
        ours = f"{mean}{spread} ({seeds} seed{'s' if seeds != '1' else ''})" if mean else NONE
        notes = "".join(f"[{numbers.setdefault(note, len(numbers) + 1)}]" for note in cell.notes)
        theirs = f"{paper} {MARKS[cell.verified][0]}" if paper else NONE
        parts = f"{theirs} \\| {ours} \\| {difference or NONE}"
        return f"{parts} {notes}" if notes else parts

    header = ["bits", "method", *(_title(column) for column in comparison.columns)]
    rows = [[bits, method, *map(text, cells)] for bits, method, cells in comparison.lines]
    source = f", {comparison.reference}" if comparison.reference else ""
    used = {cell.verified for _, _, cells in comparison.lines for cell in cells}
    legend = [f"{mark} {meaning}" for name, (mark, meaning) in MARKS.items() if name in used]
    footnotes = [f"[{number}] {note}" for note, number in numbers.items()]
    return "\n".join(
        [
            f"**{comparison.paper}{source}. Table {comparison.table}: {comparison.title}**",
            "",
            "paper \\| ours ± standard deviation over seeds \\| ours less the paper's, where both were made alike",
            "",
            render(header, rows, "markdown"),
            *(f"{line}  " for line in (*footnotes, *comparison.notes)),
            f"Published numbers: {', '.join(legend)}.",
            "",
        ]
    )

"""Tables from run folders: mean and standard deviation over seeds, the float network first.

    python scripts/make_tables.py outputs/runs outputs/sweeps [--format markdown|csv] [--out FILE] [--save FILE]

    python scripts/make_tables.py outputs/sweeps --pivot fid --methods tdq,tdq_thin,s1,s4

    python scripts/make_tables.py outputs/sweeps --paired psnr [--against "w4a8 tfmq"]    image by image, from run folders

    python scripts/make_tables.py --list                          what published tables there are
    python scripts/make_tables.py --paper tfmq-dm                 those of one paper
    python scripts/make_tables.py --paper tfmq-dm --table 2       one of them, beside our numbers
    python scripts/make_tables.py --paper tdq --table S1 --model digits    beside those of another model

Without sources all runs and sweeps in outputs are read, as report.py does. A method with other choices has a row,
or in --pivot a column, of its own, and so has one that an engine executed: its name says so, and the line above the table.

Rows that were made under different protocols (sampler, images, evaluator) are in different tables. A difference from a
published number is given only where the protocols match; footnotes say what differs.
"""

import argparse
import sys
from pathlib import Path

from tfmq_exp.cli.terminal import Terminal, say_error, standard_streams, visible
from tfmq_exp.core.files import write_atomically
from tfmq_exp.report.comparison import compare, comparison_csv, comparison_markdown
from tfmq_exp.report.image_distances import DISTANCES, DISTANCES_FILE
from tfmq_exp.report.paired_tables import PAIRED_HEADER, distance_table, networks_of, paired_table, read_members
from tfmq_exp.report.published_tables import find_paper, find_table, read_published, tables_by_paper
from tfmq_exp.report.records import ScoreRecord, read_records, save_records
from tfmq_exp.report.tables import FORMATS, by_protocol, headline, pivot, render, table, titles

FIRST = ("TFMQ-DM", "Q-Diffusion", "PTQD", "TDQ")  # the papers whose methods are here; the others quote or extend them


def main() -> int:
    """Print or write the tables."""
    args = arguments()
    try:
        listing = args.list or (args.paper and not args.table and not args.pivot)
        text = list_tables(args.paper) if listing else make_tables(args)
        if args.out:
            write_atomically(args.out, lambda path: path.write_text(text, encoding="utf-8", errors="backslashreplace"))
    except (OSError, ValueError) as error:
        say_error(Terminal(stderr=True), str(error))
        return 1
    if not args.out:
        print(visible(text), end="")
    return 0


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "sources",
        nargs="*",
        type=Path,
        help="folders of runs, or saved records; default: outputs",
        default=[Path("outputs")],
    )
    parser.add_argument("--format", choices=FORMATS, default="markdown")
    parser.add_argument("--pivot", metavar="SCORE", help="one score or error (fid, step, ...), methods as columns")
    parser.add_argument(
        "--methods", type=lambda text: text.split(","), help="of --pivot, each with its variants (default: all)"
    )
    parser.add_argument(
        "--paired",
        metavar="DISTANCE",
        help=f"from the float images, methods against each other: {', '.join(DISTANCES)}",
    )
    parser.add_argument("--against", metavar="METHOD", help="with --paired (default: the best one of the same bits)")
    parser.add_argument("--paper", help="a paper to compare with; without --table: name its tables")
    parser.add_argument("--table", help="which of the tables of --paper")
    parser.add_argument("--model", help="with --table: our numbers are those of this model, whatever the paper's is")
    parser.add_argument("--list", action="store_true", help="name the published tables")
    parser.add_argument("--save", type=Path, help="write the records themselves here, to make the table from later")
    parser.add_argument("--out", type=Path, help="write here instead of printing")
    return parser.parse_args()


def list_tables(paper: str | None) -> str:
    """The published tables of one paper or of all, those of `FIRST` at the beginning.

    Raises:
        ValueError: no such paper, or more than one.
    """
    published = read_published()
    papers = tables_by_paper(published)
    order = [find_paper(published, paper)] if paper else list(dict.fromkeys([*FIRST, *papers]))
    return "".join(
        f'--paper "{name}" --table "{table}"    {title}\n' for name in order for table, title in papers[name].items()
    )


def make_tables(args: argparse.Namespace) -> str:
    """The tables of the command line.

    Raises:
        ValueError: no such published table, or nothing measured to make a table of.
    """
    if args.paired:
        return paired_tables(args)
    if args.table and not args.paper:
        raise ValueError(f"--table {args.table} needs the --paper that it is in; --list names them")
    if args.paper and args.pivot:
        raise ValueError("--pivot is of our records alone; leave it out with --paper and --table")
    rows = find_table(read_published(), args.paper, args.table) if args.paper else []
    records = read_records(*args.sources)
    if args.model and not args.table:
        raise ValueError(f"--model {args.model} is for a published table; name it with --paper and --table")
    if args.model and args.model not in {record.model for record in records}:
        raise ValueError(
            f"no results of model {args.model!r}; there are {', '.join(sorted({r.model for r in records}))}"
        )
    if not records and not rows:
        raise ValueError(f"no results.json under {', '.join(map(str, args.sources))}")
    if args.save:
        save_records(records, args.save)
    if rows:
        comparison = compare(rows, records, args.model)
        return comparison_csv(comparison) if args.format == "csv" else comparison_markdown(comparison)
    groups = by_protocol(records)
    named = zip(groups, titles(groups), strict=True)
    return "\n".join(render_table(group, title, args) for group, title in named)


def paired_tables(args: argparse.Namespace) -> str:
    """Distances from the float images, and methods against each other on the same images; two tables for each protocol.

    Raises:
        ValueError: no run folder has distances of images, or an unknown distance or method.
    """
    members = list(read_members(*args.sources))
    if not members:
        raise ValueError(f"no {DISTANCES_FILE} beside a results.json under {', '.join(map(str, args.sources))}")
    records = [member.record for member in members]
    named = zip(networks_of(members), titles(by_protocol(records)), strict=True)
    if args.format == "csv":
        shown = [(title, paired_table(networks, args.paired, args.against)) for networks, title in named]
        rows = [[*row, title] for title, (_, rows) in shown for row in rows]
        return render([*PAIRED_HEADER, "table"], rows, args.format)
    texts = [
        f"**{title}**\n\n{render(*distance_table(networks), args.format)}\n"
        f"{render(*paired_table(networks, args.paired, args.against), args.format)}"
        for networks, title in named
    ]
    return "\n".join(texts)


def render_table(records: list[ScoreRecord], title: str, args: argparse.Namespace) -> str:
    """One table; in markdown, under a line that says how it was made, in CSV with a column that does."""
    methods = args.methods or sorted({record.method for record in records})
    shown = [record for record in records if record.method in methods] if args.pivot else records
    header, rows = pivot(records, args.pivot, methods) if args.pivot else table(records)
    if args.format == "csv":
        return render([*header, "table"], [[*row, title] for row in rows], args.format)
    return f"**{headline(title, shown)}**\n\n{render(header, rows, args.format)}"


if __name__ == "__main__":
    with standard_streams():
        sys.exit(main())

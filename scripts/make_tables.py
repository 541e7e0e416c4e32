"""The comparison table from run folders: mean and standard deviation over seeds, the float network first.

    python scripts/make_tables.py outputs/runs outputs/sweeps [--format markdown|csv] [--out FILE] [--save FILE]

    python scripts/make_tables.py outputs/sweeps --pivot fid --methods tdq,tdq_thin,s1,s4

Rows that were made under different protocols (sampler, images, evaluator) stand in different tables.
"""

import argparse
import sys
from pathlib import Path

from tfmq_exp.reporting.records import ScoreRecord, read_records, save_records
from tfmq_exp.reporting.tables import FORMATS, by_protocol, pivot, render, table


def main() -> int:
    """Print or write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "sources",
        nargs="*",
        type=Path,
        help="folders of runs, or saved records",
        default=[Path("outputs/runs"), Path("outputs/sweeps")],
    )
    parser.add_argument("--format", choices=FORMATS, default="markdown")
    parser.add_argument("--pivot", metavar="SCORE", help="one score, methods as columns")
    parser.add_argument("--methods", type=lambda text: text.split(","), help="columns of --pivot (default: all)")
    parser.add_argument("--save", type=Path, help="write the records themselves here, to make the table from later")
    parser.add_argument("--out", type=Path, help="write here instead of printing")
    args = parser.parse_args()
    try:
        records = [record for source in args.sources for record in read_records(source)]
        text = "\n".join(titled(group, args) for group in by_protocol(records))
        if not records:
            raise ValueError(f"no results.json under {', '.join(map(str, args.sources))}")
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if args.save:
        save_records(records, args.save)
    if args.out:
        args.out.write_text(text)
    else:
        print(text, end="")
    return 0


def titled(records: list[ScoreRecord], args: argparse.Namespace) -> str:
    """One table; in markdown, under a line that says how it was made."""
    methods = args.methods or sorted({record.method for record in records})
    body = render(*(pivot(records, args.pivot, methods) if args.pivot else table(records)), args.format)
    if args.format == "csv":
        return body
    record = records[0]
    sampler = record.protocol["sampler"]
    title = (
        f"{record.model}, {sampler['class']} {sampler['steps']} steps, eta {sampler['eta']}, "
        f"{record.protocol['images']} images, {record.evaluator['name']} against {record.evaluator['reference']}, "
        "simulated quantization"
    )
    return f"**{title}**\n\n{body}"


if __name__ == "__main__":
    sys.exit(main())

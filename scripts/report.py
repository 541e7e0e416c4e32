"""One HTML page from run folders: tables, charts, samples, times, configurations, and what is missing.

    python scripts/report.py outputs/sweeps/2026-11-21 [-o report.html] [--open]

    python scripts/report.py docs/results/compare_digits.jsonl       from saved records: tables and charts of scores

The page holds all that it shows, pictures and programs included: it opens anywhere, without a network.
"""

import argparse
import sys
import webbrowser
from pathlib import Path

from tfmq_exp.core.files import write_atomically
from tfmq_exp.report.html.page import page
from tfmq_exp.report.html.runs import collect
from tfmq_exp.report.published_tables import read_published

from tfmq_exp.cli.terminal import Terminal, say_error, standard_streams

PUBLISHED = Path(__file__).parents[1] / "conf" / "published"


def main() -> int:
    """Write the page and say where it is."""
    args = arguments()
    try:
        runs = collect(args.sources)
        text = page(runs, read_published(PUBLISHED))
        args.out.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(args.out, lambda path: path.write_text(text, encoding="utf-8"))
    except (OSError, ValueError) as error:
        say_error(Terminal(stderr=True), str(error))
        return 1
    print(f"{args.out}: {len(runs)} runs, {len(text.encode()) / 1e6:.1f} MB")
    if args.open:
        webbrowser.open(args.out.resolve().as_uri())
    return 0


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "sources",
        nargs="*",
        type=Path,
        default=[Path("outputs")],
        help="folders of runs, at any depth, or saved records (.jsonl); default: outputs",
    )
    parser.add_argument("-o", "--out", type=Path, help="the page (default: report.html in the first source's folder)")
    parser.add_argument("--open", action="store_true", help="show it in the browser")
    args = parser.parse_args()
    first: Path = args.sources[0]
    args.out = args.out or (first.parent if first.is_file() else first) / "report.html"
    return args


if __name__ == "__main__":
    with standard_streams():
        sys.exit(main())

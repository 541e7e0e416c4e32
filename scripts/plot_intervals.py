"""Intervals of activation quantizers over the timesteps, of several runs: a figure and tables.

    python run.py -m until=diagnose method=lsq,lsq_tdq quant=w4a4 seed=0,1,2
    python scripts/plot_intervals.py outputs/sweeps/DATE/TIME/* --out outputs/intervals

Writes `intervals.csv`, `correlations.csv` (does an activation change with the timestep, does its interval follow),
`spread.csv` (of the intervals over seeds of one method) and `intervals.png`.
"""

import argparse
import csv
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from tfmq_exp.cli.terminal import Terminal, standard_streams
from tfmq_exp.report import scales_over_time


def write(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """A CSV file; none without rows."""
    if rows:
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)


def main() -> int:
    """Read, write, and print how many intervals follow."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+", help="run folders; those without a diagnosis are left out")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    folders = [run for run in args.runs if (run / scales_over_time.FILE).is_file()]
    if not folders:
        parser.error(f"none of these has a {scales_over_time.FILE}; make it with `python run.py until=diagnose ...`")
    runs = [scales_over_time.read_scales(run) for run in folders]
    args.out.mkdir(parents=True, exist_ok=True)
    write(scales_over_time.scale_rows(runs), args.out / "intervals.csv")
    write(scales_over_time.correlations(runs), args.out / "correlations.csv")
    write(scales_over_time.spread(runs), args.out / "spread.csv")
    scales_over_time.draw(runs, args.out / "intervals.png")
    lines = scales_over_time.summary(runs)
    table = Table(title="activations by how their deviation correlates with the timestep", title_justify="left")
    for column in lines[0]:
        table.add_column(column)
    for line in lines:
        table.add_row(*(value if isinstance(value, str) else f"{value:.0%}" for value in line.values()))
    Terminal().print(table)
    return 0


if __name__ == "__main__":
    with standard_streams():
        sys.exit(main())

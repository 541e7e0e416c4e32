"""Time and peak memory of every stage of a run, and where the time goes.

    python scripts/bench_quantize.py [overrides of run.py ...] [--profile]

Runs `run.py` in a fresh process with an empty store and reads what it recorded. With --profile the run goes through
Python's profiler and the functions that took the most time are listed.
"""

import argparse
import json
import pstats
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

from tfmq_exp.cli.terminal import standard_streams

ROOT = Path(__file__).parents[1]


def main() -> int:
    """Run and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--profile", action="store_true")
    args, overrides = parser.parse_known_args()
    console = Console()
    with tempfile.TemporaryDirectory() as folder:
        profile = Path(folder) / "profile"
        python = [sys.executable, *(["-m", "cProfile", "-o", str(profile)] if args.profile else [])]
        began = time.perf_counter()
        done = subprocess.run(
            [*python, str(ROOT / "run.py"), f"paths.outputs={folder}", *overrides], cwd=ROOT, check=False
        )
        if done.returncode:
            return done.returncode
        wall = time.perf_counter() - began
        results = json.loads(next(Path(folder).rglob("results.json")).read_text(encoding="utf-8"))["rows"][-1]
        table = Table(title=f"{wall:.0f} s in all, {results['environment']['threads']} threads", title_justify="left")
        for column in ("stage", "seconds", "share", "peak MiB so far"):
            table.add_column(column, justify="left" if column == "stage" else "right")
        stages = results["cost"]["stages"]
        for name, stage in stages.items():
            table.add_row(name, f"{stage['seconds']:.1f}", f"{stage['seconds'] / wall:.0%}", f"{stage['peak_mib']:.0f}")
        rest = wall - sum(stage["seconds"] for stage in stages.values())
        table.add_row("imports, loading, figures", f"{rest:.1f}", f"{rest / wall:.0%}", "")
        console.print(table)
        if args.profile:
            pstats.Stats(str(profile)).sort_stats("tottime").print_stats(20)
    return 0


if __name__ == "__main__":
    with standard_streams():
        sys.exit(main())

"""Error against seconds of recipes of reconstruction, a figure and a table.

    python run.py -m experiment=recipes                              # AdaRound: rates and iterations
    python run.py -m experiment=recipes method=gptq_reconstruct      # the same after GPTQ
    python run.py -m experiment=recipes 'hydra.sweeper.params={}' method=tfmq_gptq    # GPTQ alone
    python scripts/plot_recipes.py outputs/sweeps --out outputs/recipes

The error is that of one step: of the predicted noise on float trajectories that calibration has not seen, over its variance. Seconds
are those that quantizing took; points without one of the two are left out. Records can be given in place of folders. Writes `recipes.csv` and `recipes.png`.
"""

import argparse
import csv
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tfmq_exp.cli.terminal import Terminal, say_error, standard_streams
from tfmq_exp.report.records import ScoreRecord, read_records

RATE, ITERATIONS = "method.weights.recipe.rounding.learning_rate", "method.weights.recipe.iterations"


def row_of(record: ScoreRecord) -> dict[str, Any]:
    """Numbers of one run."""
    named = record.settings.get("named", "") + ",".join(f"{k}={v}" for k, v in record.choices.items())
    rate = next((part.split("=")[1] for part in named.split(",") if part.strip().startswith(RATE)), "")
    errors = {name: record.errors.get(name) for name in ("step", "trajectory", "temporal_relative_mse", "psnr")}
    seconds = record.cost.get("quantization_seconds")
    what = {"model": record.model, "quant": record.quant, "method": record.method, "rate": rate, "seed": record.seed}
    return {**what, "iterations": record.cost.get("weight_iterations"), "seconds": seconds, **errors}


def draw(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """A panel for each model and quantization, a line for each method and rate."""
    import matplotlib.pyplot as plt

    panels = sorted({(row["model"], row["quant"]) for row in rows})
    figure, axes = plt.subplots(1, len(panels), figsize=(6 * len(panels), 5), squeeze=False)
    for axis, panel in zip(axes[0], panels, strict=True):
        own = [row for row in rows if (row["model"], row["quant"]) == panel]
        for method, rate in sorted({(row["method"], row["rate"]) for row in own}):
            points = [(r["seconds"], r["step"]) for r in own if (r["method"], r["rate"]) == (method, rate)]
            if line := sorted(point for point in points if None not in point):
                axis.plot(*zip(*line, strict=True), marker="o", label=f"{method} {rate}".strip())
        axis.set(xscale="log", yscale="log", xlabel="seconds of quantization", title=" ".join(panel))
        axis.grid(visible=True, which="both", alpha=0.3)
    axes[0][0].set_ylabel("error of a step")
    axes[0][-1].legend(fontsize="small")
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> int:
    """Read, write and draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sources", nargs="+", type=Path, help="folders of runs, or saved records")
    parser.add_argument("--out", type=Path, default=Path("outputs/recipes"))
    args = parser.parse_args()
    rows = [row_of(record) for record in read_records(*args.sources) if record.method != "float"]
    if not rows:
        say_error(Terminal(stderr=True), f"no results under {', '.join(map(str, args.sources))}")
        return 1
    args.out.mkdir(parents=True, exist_ok=True)
    with (args.out / "recipes.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    draw(rows, args.out / "recipes.png")
    print(args.out / "recipes.csv", args.out / "recipes.png", sep="\n")
    return 0


if __name__ == "__main__":
    with standard_streams():
        sys.exit(main())

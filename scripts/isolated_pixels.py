"""Count the images of runs with an isolated wrong pixel, of the float network and of the quantized one.

python scripts/isolated_pixels.py outputs/runs/2026-12-01/*
"""

import argparse
import json
import sys
from pathlib import Path

import torch
from rich.table import Table
from safetensors.torch import load_file

from tfmq_exp.cli.terminal import Terminal, standard_streams
from tfmq_exp.diagnostics.isolated_pixels import GREY_LEVELS, isolated_pixels


def counted(run: Path, stage: str) -> str:
    """Images of a stage with an isolated pixel, of all."""
    folder = Path(json.loads((run / "artifacts.json").read_text(encoding="utf-8"))[stage]["path"])
    images = torch.cat([load_file(file)["images"] for file in sorted(folder.glob("images-*.safetensors"))])
    return f"{isolated_pixels(images)} of {len(images)}"


def main() -> int:
    """Print a row for each run that has images."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, help="run folders, those of sweeps too")
    table = Table("run", "float", "quantized", title=f"a pixel over {GREY_LEVELS} grey levels outside its neighbours")
    for run in parser.parse_args().runs:
        try:
            table.add_row(run.name, counted(run, "float images"), counted(run, "images"))
        except (OSError, KeyError, ValueError):
            table.add_row(run.name, *2 * ["no images of a finished run"])
    Terminal().print(table)
    return 0


if __name__ == "__main__":
    with standard_streams():
        sys.exit(main())

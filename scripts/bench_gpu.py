"""Equality of a CUDA device with the CPU, and what quantizing and sampling a network of real size cost on it.

    python scripts/bench_gpu.py --out FOLDER [--minutes 9] [--device cuda] [--quick]

Compares the shipped digits model on the device and on the CPU, then measures LDM-4 of LSUN bedrooms and Stable Diffusion v1.4 with
random weights, and estimates the full recipe. Parts come in the order of their importance; those that the minutes do not suffice
for are listed as skipped. Writes FOLDER/gpu.json and FOLDER/gpu.md after every part. `--quick` takes small networks, whose numbers
mean nothing. docs/gpu.md says what it needs.

Exit status: 0; 1 if a difference exceeds its tolerance or a part failed.
"""

import argparse
import functools
import json
import logging
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))  # as it is for a script, for tests that import this file

import torch
from gpu import speed
from gpu.equality import CHECKS, Check, Digits
from gpu.measuring import Clock, Part, Row, markdown, run_part
from gpu.networks import Network
from rich.console import Console

from tfmq_exp.cli.environment import git_state, pick_device, prepare
from tfmq_exp.core.files import write_atomically

MODELS = ("ldm_bedroom", "sd_v1_4")
ESSENTIAL = 4  # measurements of a network, up to its estimate
UNITS_MINUTES = 1.5  # for the iterations of all units of a network; the others follow from their multiply-accumulates


def describe(device: torch.device, args: argparse.Namespace) -> dict[str, Any]:
    """The machine and the settings."""
    found = {"device": "CPU", "commit": git_state(), "torch": torch.__version__, "python": sys.version.split()[0]}
    if device.type == "cuda":
        card = torch.cuda.get_device_properties(device)
        capability = f"{card.major}.{card.minor}"
        memory = f"{card.total_memory / 2**30:.0f} GiB"
        found |= {"device": card.name, "capability": capability, "memory": memory, "cuda": torch.version.cuda}
        found["driver"] = driver_version()
    tf32 = f"{torch.backends.cuda.matmul.allow_tf32}, {torch.backends.cudnn.allow_tf32}"
    found |= {"minutes": args.minutes, "quick": args.quick, "TF32 unless named (products, convolutions)": tf32}
    return found


def driver_version() -> str:
    """The driver's version, by the program that comes with it; `unknown` without it."""
    words = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    with suppress(OSError, subprocess.CalledProcessError):
        return subprocess.run(words, check=True, capture_output=True, text=True).stdout.split()[0]
    return "unknown"


def comparisons(device: torch.device, missed: list[str]) -> list[Part]:
    """The comparisons with the CPU; the names of those that exceed their tolerance are added to `missed`."""
    digits = functools.cache(lambda: Digits(device))

    def rows(compare: Callable[[Digits], list[Check]]) -> list[Row]:
        checks = compare(digits())
        missed.extend(check.what for check in checks if not check.passed)
        return [check.row() for check in checks]

    return [Part(f"equality: {name}", 5, functools.partial(rows, compare)) for name, compare in CHECKS.items()]


def measurements(network: Network, clock: Clock) -> list[Part]:
    """Measurements of one network, the first ESSENTIAL for the estimate; seconds are guesses for an H100, with a reserve."""
    large = network.name == "sd_v1_4"
    works = (
        ("weight ranges", 60 if large else 30, lambda: speed.calibrate(network)),
        ("iterations", 20, lambda: speed.iterations(network, Clock(min(UNITS_MINUTES, clock.left / 60)))),
        ("images", 60 if large else 40, lambda: speed.sampling(network)),
        ("full recipe", 0, lambda: speed.full_recipe(network)),
        ("GPTQ", 30, lambda: speed.closed_form(network)),
        ("variants of an iteration", 20, lambda: speed.variants(network)),
        ("torchao", 60 if large else 40, lambda: speed.engines(network)),
    )
    return [Part(f"{network.name}: {name}", seconds, work) for name, seconds, work in works]


def write(found: dict[str, Any], folder: Path) -> None:
    """Both files, as far as the parts have come."""
    for name, text in {"gpu.json": json.dumps(found, indent=2) + "\n", "gpu.md": markdown(found)}.items():
        write_atomically(folder / name, lambda path, text=text: path.write_text(text, encoding="utf-8"))


def main(arguments: Sequence[str] | None = None) -> int:
    """Check and measure, part by part; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the two files")
    parser.add_argument("--minutes", type=float, default=9.0, help="after which nothing more begins")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--quick", action="store_true", help="small networks, every part")
    args = parser.parse_args(arguments)
    clock, console = Clock(args.minutes), Console()
    prepare(None)
    for name in ("pytorch_lightning", "lightning"):
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        device = pick_device(args.device)
    except ValueError as error:
        parser.error(str(error))
    args.out.mkdir(parents=True, exist_ok=True)
    found: dict[str, Any] = {"machine": describe(device, args), "parts": []}
    missed: list[str] = []

    measured = [measurements(Network(name, device, args.quick), clock) for name in MODELS]
    parts = comparisons(device, missed)
    for some in (slice(ESSENTIAL), slice(ESSENTIAL, None)):  # of every network, before what is left
        parts += [part for each in measured for part in each[some]]
    with torch.no_grad():
        for part in parts:
            result = run_part(part, clock, device, patient=args.quick)
            console.print(f"{part.name}: {result['status']}, {clock.left:.0f} s left", highlight=False, markup=False)
            found["parts"].append(result)
            write(found, args.out)
    console.print(markdown(found), highlight=False, markup=False, soft_wrap=True)
    failed = [part["part"] for part in found["parts"] if part["status"].startswith("failed")]
    for name in (*missed, *failed):
        console.print(f"not as expected: {name}", highlight=False, markup=False)
    return 1 if missed or failed else 0


if __name__ == "__main__":
    sys.exit(main())

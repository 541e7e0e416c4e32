"""Memory of reconstructing the largest unit of a network of real size, whose activations go beyond the budget.

    python scripts/bench_memory.py ldm_bedroom [--samples 5120 --budget-gib 8 --cache int8 --iterations 3]

Random weights. The unit's inputs and outputs are computed for a few samples, and stored again and again until there are as many as
asked for, through the same allocators and formats as in a run; then the unit learns for some iterations, and its error is measured.
Prints the bytes of the activations, how many of them are in memory and how many in files, and the peak of anonymous memory (pages
of files are the system's, which takes them back when it needs them) beyond that of the networks.
"""

import argparse
import logging
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from compare_reference import NoCheckpoints
from gpu.networks import Network, recipe_of
from rich.console import Console
from rich.table import Table

from tfmq_exp.cli.terminal import standard_streams
from tfmq_exp.core.batches import batches
from tfmq_exp.core.formatting import format_bytes
from tfmq_exp.quant.quantizers import Mode, modes
from tfmq_exp.reconstruction.activation_cache import SpillAllocator, TensorTree
from tfmq_exp.reconstruction.cache_format import FORMATS
from tfmq_exp.reconstruction.capture import UnitActivations, sample_bytes
from tfmq_exp.reconstruction.context import ComputeConfig, ReconstructionContext, quiet_trainer
from tfmq_exp.reconstruction.output_replay import OutputReplay
from tfmq_exp.reconstruction.unit_learning import learn_unit, unit_error

GIB = 2**30
CPU = torch.device("cpu")


def anonymous_bytes() -> int:
    """Memory of this process that belongs to no file."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))


@contextmanager
def peak_memory() -> Iterator[list[int]]:
    """The peak of anonymous memory inside the block, beyond that at its start, as the only item of a list."""
    start, peak, ended = anonymous_bytes(), [0], threading.Event()

    def watch() -> None:
        while not ended.wait(0.02):
            peak[0] = max(peak[0], anonymous_bytes() - start)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield peak
    finally:
        ended.set()
        thread.join()


def repeated(tree: TensorTree, samples: int, storage: SpillAllocator) -> TensorTree:
    """The samples of a tree again and again."""
    found = TensorTree.like(tree.structure(tree.tensors), samples, storage)
    for rows in batches(samples, len(tree)):
        found.write(rows.start, tree.structure([x[: len(rows)] for x in tree.tensors]))
    return found


def measure(args: argparse.Namespace) -> dict[str, str]:
    """Measure what the command line asks for; the rows of the table."""
    network = Network(args.model, CPU, args.quick)
    data = network.noise(1)
    sizes = sample_bytes(network.denoiser.network, network.units[1:], data, with_inputs=True, form=args.cache)
    unit = next(unit for unit in network.units if unit.name == max(sizes, key=lambda name: sizes[name]))
    few = network.activations(unit, 8, 0)
    model: Any = network.learning
    for layer in unit.layers:
        model.calibrate_weights([layer])
    budget, quiet = int(args.budget_gib * GIB), NoCheckpoints()
    compute = ComputeConfig(network.batch, budget, quiet_trainer(CPU))
    context = ReconstructionContext(model, network.denoiser.network, network.structure, data, compute, 0, quiet, quiet)
    storages = compute.storage(4, args.cache), compute.storage(2, args.cache)
    with peak_memory() as peak:
        stored = [
            repeated(tree, args.samples, s)
            for tree, s in zip((few.inputs["float"], few.outputs), storages, strict=True)
        ]
        activations = UnitActivations({"float": stored[0]}, stored[1])
        with modes(model.weight_quantizers(unit.layers), Mode.QUANTIZE):
            learn_unit(context, unit, activations, recipe_of(args.iterations, network.batch))
        unit_error(context, unit, activations, OutputReplay(budget // 4))
    total, files = sum(tree.nbytes for tree in stored), sum(storage.spilled for storage in storages)
    of_one = [sum(x[0].numel() for x in tree.tensors) for tree in (few.inputs["float"], few.outputs)]
    as_float = 4 * args.samples * (of_one[0] + 2 * of_one[1])
    for storage in storages:
        storage.clear()
    return {
        "unit": unit.name,
        "samples": f"{args.samples}",
        "format": args.cache,
        "inputs and twice the outputs as float32": format_bytes(as_float),
        "activations": format_bytes(total),
        "of them in memory": format_bytes(total - files),
        "in files": format_bytes(files),
        "budget": format_bytes(budget),
        "peak of anonymous memory beyond the networks'": format_bytes(peak[0]),
    }


def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=("ldm_bedroom", "sd_v1_4"))
    parser.add_argument("--samples", type=int, default=5120)
    parser.add_argument("--budget-gib", type=float, default=8.0)
    parser.add_argument("--cache", choices=FORMATS, default="float32")
    parser.add_argument("--iterations", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="a small network, for a test")
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="pytorch_lightning")
    table = Table(show_header=False)
    args = parser.parse_args()
    if args.samples < 1 or args.iterations < 1:
        parser.error(f"--samples and --iterations must be at least 1, got {args.samples} and {args.iterations}")
    for name, value in measure(args).items():
        table.add_row(name, value)
    Console().print(table)


if __name__ == "__main__":
    with standard_streams():
        main()

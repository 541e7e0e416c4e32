"""CPU seconds and errors of recipes of reconstruction on one network: the published one written plainly, ours, and GPTQ.

    OMP_NUM_THREADS=1 python scripts/bench_reconstruction.py DIR [--iterations 200] [--seeds 0 1 2] [--save FILE.json]

DIR is a folder as `compare_reference.py` takes it; the seconds that it records come from another machine, these do not. All recipes
take turns in this process with the same network, data, grids and units, so their ratios do not depend on the machine's speed.

    plain                    `plain_recipe.py`: what the original program does, step by step
    AdaRound                 the same recipe as this package does it
    GPTQ                     in closed form, nothing learns
    GPTQ, then AdaRound      50 iterations at a rate of 0.1 from GPTQ's integers
"""

import argparse
import copy
import json
import logging
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from compare_reference import NoCheckpoints, fuses_qkv, learning_of, output_error, read, released_plan
from plain_recipe import plain_activations, plain_capture, plain_learning, plain_weight_grids
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file

from tfmq_exp.calibration.timesteps import EveryKth
from tfmq_exp.cli.terminal import standard_streams
from tfmq_exp.core.files import write_json
from tfmq_exp.core.seeds import derive_seed
from tfmq_exp.denoisers.families.unet import attentions
from tfmq_exp.denoisers.originals import compvis_unet
from tfmq_exp.denoisers.read_structure import read_structure
from tfmq_exp.methods.activations import CalibrateRanges
from tfmq_exp.quant.observers import LpObserver
from tfmq_exp.quant.scales.observed_ranges import PerStepConfig
from tfmq_exp.reconstruction.activation_cache import SpillAllocator
from tfmq_exp.reconstruction.capture import Capture
from tfmq_exp.reconstruction.closed_form import GPTQConfig
from tfmq_exp.reconstruction.context import ComputeConfig, ReconstructionContext, quiet_trainer
from tfmq_exp.reconstruction.loop import capture_float_units, reconstruct
from tfmq_exp.reconstruction.module import ReconstructionConfig
from tfmq_exp.reconstruction.units import TemporalAware, Unit
from tfmq_exp.surgery.config import ScalePlan
from tfmq_exp.surgery.quantized_network import QuantizedNetwork, build_quantized_network
from tfmq_exp.surgery.resolve import resolve

PHASES = ("grids, capture, GPTQ", "learning", "activation ranges")
ERRORS = ("w, calibration", "w, held out", "w + a, calibration", "w + a, held out")


class Stopwatch:
    """CPU seconds of this process by phase."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = dict.fromkeys(PHASES, 0.0)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Add the seconds of a block to a phase."""
        start = time.process_time()
        yield
        self.seconds[name] += time.process_time() - start


class LearningTime(pl.Callback):
    """Moves the seconds of every training from the phase around it to `learning`."""

    def __init__(self, watch: Stopwatch) -> None:
        self.watch, self.start = watch, 0.0

    def setup(self, *_: Any, **__: Any) -> None:
        self.start = time.process_time()

    def teardown(self, *_: Any, **__: Any) -> None:
        took = time.process_time() - self.start
        self.watch.seconds[PHASES[1]] += took
        self.watch.seconds[PHASES[0]] -= took


@dataclass
class Bench:
    """A network of a folder with its data, to be quantized again and again."""

    folder: Path

    def __post_init__(self) -> None:
        reference = json.loads((self.folder / "reference.json").read_text(encoding="utf-8"))
        self.recipe, architecture = reference["recipe"], reference["architecture"]
        self.tensors = load_file(self.folder / "data.safetensors")
        self.network = compvis_unet.load_unet(architecture, load_file(self.folder / "init_state.safetensors"))
        timesteps = sorted((int(t) for t in self.tensors["tsteps"]), reverse=True)
        self.data, self.held = (read(self.tensors, part, timesteps) for part in ("cali", "held"))
        cpu = torch.device("cpu")
        self.parts = read_structure(self.network, {k: v[:1] for k, v in self.data.inputs(cpu).items()})
        plan = released_plan(self.recipe["w_bits"], self.recipe["a_bits"], fuses_qkv(architecture))
        scales = ScalePlan(PerStepConfig(), PerStepConfig())
        self.resolved = resolve(plan, self.parts, tuple(attentions(self.network)), scales, tuple(timesteps))
        self.compute = ComputeConfig(2 * self.recipe["batch_size"], 2**32, quiet_trainer(cpu))

    @cached_property
    def learnable(self) -> Any:
        """The network whose parameters all get gradients, as in the original program."""
        return copy.deepcopy(self.network).requires_grad_(True)

    def model(self) -> tuple[QuantizedNetwork, list[Unit]]:
        """A network to quantize, and its units."""
        model = build_quantized_network(self.network, self.resolved, LpObserver(memory=2**22))
        return model, TemporalAware()(self.parts, frozenset(model.weight_layers()))

    def errors(self, model: QuantizedNetwork) -> list[float]:
        """Output errors on both sets."""
        pairs = (self.data, self.tensors["fp_out"]), (self.held, self.tensors["fp_out_held"])
        return [output_error(model, *pair) for pair in pairs]

    def calibrate(self, model: QuantizedNetwork, seed: int) -> None:
        """Set the activation ranges."""
        CalibrateRanges(self.recipe["samples_per_step"], EveryKth()).ranges(model, self.data, seed)

    def ours(self, learning: ReconstructionConfig, seed: int) -> tuple[dict[str, float], list[float]]:
        """Seconds and errors of a recipe of this package."""
        watch, quiet, trainer = Stopwatch(), NoCheckpoints(), self.compute.trainer

        def timed(callbacks: Sequence[pl.Callback], **settings: Any) -> pl.Trainer:
            return trainer(callbacks=[*callbacks, LearningTime(watch)], **settings)

        with watch.phase(PHASES[0]):
            model, units = self.model()
            compute = replace(self.compute, trainer=timed)
            context = ReconstructionContext(model, self.network, self.parts, self.data, compute, seed, quiet, quiet)
            reconstruct(context, units, learning)
        weights_only = self.errors(model)
        with watch.phase(PHASES[2]):
            self.calibrate(model, seed)
        return watch.seconds, weights_only + self.errors(model)

    def plain(self, learning: ReconstructionConfig, seed: int) -> tuple[dict[str, float], list[float]]:
        """Seconds and errors of the plain recipe. What it computes again and again, it gets here once, untimed, and times as it does it."""
        watch, quiet = Stopwatch(), NoCheckpoints()
        model, units = self.model()
        with watch.phase(PHASES[0]):
            plain_weight_grids(model)
        model.calibrate_weights()
        context = ReconstructionContext(model, self.network, self.parts, self.data, self.compute, seed, quiet, quiet)
        for unit, view in capture_float_units(context, units, learning):
            inputs = view.inputs.get("float") or Capture(self.data, self.compute.batch, SpillAllocator(2**32)).inputs(
                model, unit.module(model.network)
            )
            with watch.phase(PHASES[0]):
                plain_capture(model, self.network, unit, self.data, self.recipe["batch_size"])
            with watch.phase(PHASES[1]):
                plain_learning(
                    model, unit, self.learnable, inputs, view.outputs, learning, derive_seed(seed, unit.name)
                )
            for layer in unit.layers:
                model.freeze(layer)
        weights_only = self.errors(model)
        with watch.phase(PHASES[2]):
            plain_activations(model, self.data, self.recipe["a_bits"])
        self.calibrate(model, seed)
        return watch.seconds, weights_only + self.errors(model)


def spread(values: Sequence[float], form: str) -> str:
    """Mean, with the standard deviation of several."""
    deviation = f" ± {statistics.stdev(values):{form}}" if len(values) > 1 else ""
    return f"{statistics.mean(values):{form}}{deviation}"


def table(title: str, runs: Mapping[str, Sequence[tuple[Mapping[str, float], Sequence[float]]]]) -> Table:
    """Seconds, their ratio to the plain recipe's, and errors of every recipe."""
    shown = Table(title=title, title_justify="left")
    for column in ("", *(f"{phase}, s" for phase in PHASES), "total, s", "learning / plain", "total / plain", *ERRORS):
        shown.add_column(column, justify="right" if column else "left")

    def median(name: str, *phases: str) -> float:
        return statistics.median(sum(seconds[phase] for phase in phases) for seconds, _ in runs[name])

    for name, results in runs.items():
        seconds = [median(name, phase) for phase in PHASES] + [median(name, *PHASES)]
        ratios = [median(name, *of) / median("plain", *of) for of in (PHASES[1:2], PHASES)]
        errors = [spread(values, ".5f") for values in zip(*(errors for _, errors in results), strict=True)]
        shown.add_row(name, *(f"{x:.2f}" for x in seconds), *(f"{x:.2f}" for x in ratios), *errors)
    return shown


def main() -> None:
    """Run every recipe with every seed, print the table, and save the numbers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--iterations", type=int, help="per unit (default: the recipe's)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--save", type=Path, help="a JSON file of all numbers")
    args = parser.parse_args()
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="pytorch_lightning")
    bench = Bench(args.folder)
    adaround = learning_of(bench.recipe, args.iterations or bench.recipe["iters"])
    assert adaround.rounding is not None
    fast = replace(adaround, iterations=50, gptq=GPTQConfig(), rounding=replace(adaround.rounding, learning_rate=0.1))
    recipes: dict[str, Callable[[int], tuple[dict[str, float], list[float]]]] = {
        "plain": lambda seed: bench.plain(adaround, seed),
        "AdaRound": lambda seed: bench.ours(adaround, seed),
        "GPTQ": lambda seed: bench.ours(replace(adaround, gptq=GPTQConfig(), rounding=None), seed),
        "GPTQ, then AdaRound": lambda seed: bench.ours(fast, seed),
    }
    runs = {name: list[tuple[dict[str, float], list[float]]]() for name in recipes}
    for seed in args.seeds:
        for name, run in recipes.items():
            runs[name].append(run(seed))
    units = len(bench.model()[1])
    title = f"{args.folder.name}: {units} units, AdaRound of {adaround.iterations} iterations, {len(args.seeds)} seeds"
    Console().print(table(f"{title}; CPU seconds are medians", runs))
    if args.save:
        rows = {
            name: [{"seconds": s, "errors": dict(zip(ERRORS, e, strict=True))} for s, e in all_]
            for name, all_ in runs.items()
        }
        write_json(args.save, {"seeds": args.seeds, "iterations": adaround.iterations, "recipes": rows})


if __name__ == "__main__":
    with standard_streams():
        main()

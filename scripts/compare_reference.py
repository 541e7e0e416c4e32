"""Quantize a small network that the original TFMQ-DM program has quantized, and print our numbers beside its own.

    python scripts/compare_reference.py DIR [--seed 0] [--iterations N]

DIR holds `init_state.safetensors` (weights with original key names), `data.safetensors` (calibration and held-out inputs,
float outputs of the original) and `reference.json` (architecture, recipe, the original's results and CPU seconds). Same recipe and
float layers as the original. CPU seconds are those of this process: OMP_NUM_THREADS=1 compares with the original's thread.
"""

import argparse
import json
import logging
import os
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from safetensors.torch import load_file
from torch import Tensor, nn

from tfmq_exp.calibration.dataset import CalibrationSet
from tfmq_exp.calibration.timesteps import EveryKth
from tfmq_exp.cli.terminal import Terminal, standard_streams
from tfmq_exp.denoisers.families.unet import attentions
from tfmq_exp.denoisers.originals import compvis_unet
from tfmq_exp.denoisers.read_structure import read_structure
from tfmq_exp.denoisers.structure import Role
from tfmq_exp.diagnostics.temporal_error import temporal_feature_error
from tfmq_exp.methods.activations import CalibrateRanges
from tfmq_exp.quant.observers import LpObserver
from tfmq_exp.quant.scales.observed_ranges import PerStepConfig, StaticConfig
from tfmq_exp.quant.timestep_context import TimestepContext
from tfmq_exp.reconstruction.context import ComputeConfig, ReconstructionContext, UnitReport, UnitResult, quiet_trainer
from tfmq_exp.reconstruction.loop import reconstruct
from tfmq_exp.reconstruction.module import LearnRounding, ReconstructionConfig
from tfmq_exp.reconstruction.objectives import Annealing, Lp
from tfmq_exp.reconstruction.units import QuantizedInputs, TemporalAware
from tfmq_exp.surgery import serialization
from tfmq_exp.surgery.config import AttentionBits, LayerBits, QuantizationConfig, ScalePlan
from tfmq_exp.surgery.quantized_network import QuantizedNetwork, build_quantized_network
from tfmq_exp.surgery.resolve import coverage, resolve

Row = tuple[str, float, Sequence[float], float | None, str]  # what, ours, the reference's, bound, form of the numbers
# Names of the output errors and of the phases, and where they are in the reference's results.
ERRORS = {
    "output error, weights, calibration": ("adaround_w", "rel"),
    "output error, weights, held-out": ("adaround_w", "rel_held"),
    "output error, w + a, calibration": ("adaround_wa", "rel"),
    "output error, w + a, held-out": ("adaround_wa", "rel_held"),
}
PHASES = {
    "weight grids": ("weight_init_forward",),
    "reconstruction (capture + learning)": ("capture", "optimisation"),
    "activation ranges": ("act_calibration_forwards",),
}


def released_plan(weight: int, activation: int, fuses_qkv: bool) -> QuantizationConfig:
    """Bits of the release, found by running it: stem, head, first time layer, shortcuts and downsamplers stay float.

    So do LDM's fused attention, a Conv1d, and the inputs of the second time layer and of the first residual convolution.
    """
    roles = {role.value: LayerBits(weight, activation) for role in Role}
    fused = (Role.ATTN_QKV, Role.ATTN_OUT) if fuses_qkv else ()
    roles |= {role.value: LayerBits() for role in (Role.STEM, Role.HEAD, Role.SHORTCUT, Role.DOWNSAMPLE, *fused)}
    weight_only = ("time_embedding.linear_2", "down_blocks.0.resnets.0.conv1")
    sites = {"time_embedding.linear_1": LayerBits(), **dict.fromkeys(weight_only, LayerBits(weight, None))}
    return QuantizationConfig(roles, AttentionBits(), sites)


def fuses_qkv(architecture: Mapping[str, Any]) -> bool:
    """Whether the original's attention is a Conv1d: LDM without a spatial transformer."""
    return "kwargs" in architecture and not architecture["kwargs"].get("use_spatial_transformer")


def learning_of(recipe: Mapping[str, Any], iterations: int) -> ReconstructionConfig:
    """Settings of the original's learning."""
    rounding = LearnRounding(1e-3, recipe["w"], Annealing(recipe["warmup"], *map(float, recipe["b_range"])))
    return ReconstructionConfig(iterations, recipe["batch_size"], Lp(recipe["p"]), QuantizedInputs(), rounding=rounding)


class NoCheckpoints:
    """Keeps nothing of a unit, and logs its errors and its time."""

    def get(self, unit: str) -> UnitResult | None:
        return None

    def scoped(self, name: str) -> "NoCheckpoints":
        return self

    def ignore(self, *_: Any, **__: Any) -> None:
        """Nothing is kept or shown while units are learned."""

    put = on_start = on_progress = on_iteration_end = ignore

    def on_unit_end(self, unit: str, report: UnitReport | None) -> None:
        if report:
            errors = report.error_before, report.error_after, report.seconds
            logging.info("%-48s error %.4f -> %.4f  %.1f s", unit, *errors)


def read(tensors: Mapping[str, Tensor], part: str, timesteps: list[int]) -> CalibrationSet:
    """One of the two data sets of the folder; `.c` is cross-attention context."""
    t = tensors[f"{part}.t"].round().long()
    step = TimestepContext(timesteps).step_indices(t)
    context = {"encoder_hidden_states": tensors[f"{part}.c"]} if f"{part}.c" in tensors else {}
    return CalibrationSet(tensors[f"{part}.x"], t, step, torch.arange(len(t)), context)


@torch.no_grad()
def output_error(model: nn.Module, data: CalibrationSet, expected: Tensor) -> float:
    """Mean squared error of the outputs over the variance of the float ones, averaged over steps as the original does."""
    errors, rows = (outputs_of(model, data) - expected).square(), [data.step == step for step in data.step.unique()]
    variances = torch.stack([expected[own].var() for own in rows])
    return float(torch.stack([errors[own].mean() for own in rows]).mean() / variances.mean())


@contextmanager
def timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    """Note the CPU seconds of a block."""
    began = time.process_time()
    yield
    seconds[name] = time.process_time() - began


def reference_seconds(run: Mapping[str, Any], phase: str) -> float:
    """The original's seconds of a phase; its phases are wall time, so they are scaled to its CPU total."""
    seconds = run["seconds"]
    share = 1.0 if phase == "total" else sum(seconds[part] for part in PHASES[phase]) / seconds["total_wall"]
    return share * seconds["total_cpu"]


def main() -> int:
    """Run the comparison; the exit status says whether ours holds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--iterations", type=int, help="iterations per unit (default: the recipe's)")
    parser.add_argument("--verbose", action="store_true", help="a line per unit")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO if args.verbose else logging.WARNING, format="%(message)s")
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="pytorch_lightning")
    for name in ("reference.json", "init_state.safetensors", "data.safetensors"):
        if not (args.folder / name).is_file():
            parser.error(f"{args.folder} has no {name}")
    reference = json.loads((args.folder / "reference.json").read_text(encoding="utf-8"))
    recipe, architecture = reference["recipe"], reference["architecture"]
    iterations = args.iterations or recipe["iters"]
    tensors = load_file(args.folder / "data.safetensors")
    float_network = compvis_unet.load_unet(architecture, load_file(args.folder / "init_state.safetensors"))
    timesteps = sorted((int(t) for t in tensors["tsteps"].tolist()), reverse=True)
    calibration, held = read(tensors, "cali", timesteps), read(tensors, "held", timesteps)
    deviation = float((outputs_of(float_network, calibration) - tensors["fp_out"]).abs().max())
    parts = read_structure(float_network, {k: v[:1] for k, v in calibration.inputs(torch.device("cpu")).items()})
    plan = released_plan(recipe["w_bits"], recipe["a_bits"], fuses_qkv(architecture))
    names, scales = tuple(attentions(float_network)), ScalePlan(PerStepConfig(), PerStepConfig())
    resolved = resolve(plan, parts, names, scales, tuple(timesteps))

    def errors() -> list[float]:
        return [output_error(model, calibration, tensors["fp_out"]), output_error(model, held, tensors["fp_out_held"])]

    seconds, quiet = dict[str, float](), NoCheckpoints()
    with timed(seconds, "weight grids"):
        model = build_quantized_network(float_network, resolved, LpObserver(memory=2**22))
        model.calibrate_weights()
    compute = ComputeConfig(recipe["batch_size"] * 2, cache_bytes=2**32, trainer=quiet_trainer(torch.device("cpu")))
    learning = learning_of(recipe, iterations)
    task = ReconstructionContext(model, float_network, parts, calibration, compute, args.seed, quiet, quiet)
    with timed(seconds, "reconstruction (capture + learning)"):
        reconstruct(task, TemporalAware()(parts, frozenset(model.weight_layers())), learning)
    weights_only = errors()
    with timed(seconds, "activation ranges"):
        CalibrateRanges(recipe["samples_per_step"], EveryKth()).ranges(model, calibration, args.seed)
    seconds["total"] = sum(seconds.values())
    cosine = statistics.mean(row["cosine"] for row in temporal_feature_error(model, float_network, parts))
    bits = {role.value: LayerBits(recipe["w_bits"], recipe["a_bits"]) for role in Role}
    bits |= {role.value: LayerBits(8, recipe["a_bits"]) for role in (Role.STEM, Role.HEAD)}
    scales = ScalePlan(PerStepConfig(), StaticConfig())
    own_plan = resolve(QuantizationConfig(bits), parts, (), scales, tuple(timesteps))
    own = build_quantized_network(float_network, own_plan, LpObserver(candidates=1))
    own.calibrate_weights()
    CalibrateRanges(32, EveryKth()).ranges(own, calibration, 0)
    fp32 = 4 * sum(p.numel() for p in float_network.parameters())
    runs = [run for run in reference["runs"].values() if run["iters"] == iterations]
    rows: list[Row] = []
    for (name, (part, key)), value in zip(ERRORS.items(), weights_only + errors(), strict=True):
        theirs = [run["quality"][part][key] for run in runs]
        spread = statistics.stdev(theirs) if len(theirs) > 1 else 0.0
        rows.append((name, value, theirs, statistics.mean(theirs) + 2 * spread if theirs else None, ".5f"))
    theirs = [statistics.mean(run["quality"]["adaround_wa"]["temporal_cos_per_step"]) for run in runs]
    rows.append(("temporal feature cosine", cosine, theirs, None, ".5f"))
    for phase, value in seconds.items():
        theirs = [reference_seconds(run, phase) for run in runs]
        bound = statistics.mean(theirs) / 2 if theirs and phase == "total" else None
        rows.append((f"CPU s, {phase}", value, theirs, bound, ".2f"))
    theirs = [run["ckpt"]["bytes"] / run["ckpt"]["fp32_bytes"] for run in runs]
    rows.append(("artefact / fp32 bytes, original's exceptions", stored_bytes(model) / fp32, theirs, 0.27, ".3f"))
    rows.append(("artefact / fp32 bytes, our default policy", stored_bytes(own) / fp32, [], 0.18, ".3f"))
    covered, console = coverage(resolved, parts), Terminal()
    console.print(f"float outputs differ from the original's by at most {deviation:.1e}")
    shares = f"{covered['weight_share']:.1%} of all, {covered['mac_share_weights_and_inputs']:.1%} of MACs"
    console.print(f"weights quantized: {shares} on integer operands")
    return print_table(f"simulated quantization, {len(runs)} reference runs at equal iterations", rows, console)


@torch.no_grad()
def outputs_of(network: nn.Module, data: CalibrationSet) -> Tensor:
    """Outputs over a whole set."""
    parts = (data[slice(i, i + 32)].inputs(torch.device("cpu")) for i in range(0, len(data), 32))
    return torch.cat([network(**inputs).sample for inputs in parts])


def stored_bytes(model: QuantizedNetwork) -> int:
    """Bytes of the artefact."""
    for layer in model.weight_layers():
        model.freeze(layer)
    with tempfile.TemporaryDirectory() as folder:
        return serialization.save(model, Path(folder) / "quantized.safetensors")


def print_table(title: str, rows: Sequence[Row], console: Terminal) -> int:
    """Print our results next to the reference's mean and spread; return the number of bounds that are missed."""
    missed, table = 0, Table(title=title, title_justify="left")
    for column in ("", "ours", "reference", "bound", ""):
        table.add_column(column, justify="left" if not column else "right")
    for name, own, theirs, bound, form in rows:
        shown = f"{statistics.mean(theirs):{form}}" if theirs else ""
        shown += f" ± {statistics.stdev(theirs):{form}}" if len(theirs) > 1 else ""
        verdict = "" if bound is None else "ok" if own <= bound else "MISSED"
        missed += verdict == "MISSED"
        table.add_row(name, f"{own:{form}}", shown, "" if bound is None else f"{bound:{form}}", verdict)
    console.print(table)
    console.print(
        "The reference's seconds are of its own machine; bench_reconstruction.py times its recipe on this one."
    )
    return missed


if __name__ == "__main__":
    with standard_streams():
        os.environ.setdefault("TQDM_DISABLE", "1")
        sys.exit(main())

"""Quantize a small network that the original TFMQ-DM program has quantized, and print our numbers beside its own.

    python scripts/compare_reference.py DIR [--seed 0] [--iterations N]

DIR holds `init_state.safetensors` (weights with original key names), `data.safetensors` (calibration and held-out inputs,
float outputs of the original) and `reference.json` (architecture, recipe, the original's results and CPU seconds). Same
recipe and same float layers as the original. CPU seconds are those of this process; set OMP_NUM_THREADS=1 to compare with
the original's single thread.
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
from collections.abc import Iterator, Mapping
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
from tfmq_exp.denoisers.loading import compvis_unet
from tfmq_exp.denoisers.structure import Role
from tfmq_exp.denoisers.unet import attentions, read_structure
from tfmq_exp.diagnostics.temporal_error import temporal_feature_error
from tfmq_exp.methods.activations import CalibrateRanges
from tfmq_exp.quant.observers import LpObserver
from tfmq_exp.quant.scales.running_range import PerStepConfig, StaticConfig
from tfmq_exp.quant.timestep_context import TimestepContext
from tfmq_exp.reconstruction.context import ComputeConfig, ReconstructionContext, UnitReport, UnitResult, quiet_trainer
from tfmq_exp.reconstruction.loop import reconstruct
from tfmq_exp.reconstruction.module import LearnRounding, ReconstructionConfig
from tfmq_exp.reconstruction.objectives import Annealing, Lp
from tfmq_exp.reconstruction.units import QuantizedInputs, TemporalAware
from tfmq_exp.surgery import serialization
from tfmq_exp.surgery.config import AttentionBits, LayerBits, QuantizationConfig, ScalePlan
from tfmq_exp.surgery.quantized_unet import build_quantized_unet
from tfmq_exp.surgery.resolve import coverage, resolve


def released_plan(weight: int, activation: int, fuses_qkv: bool) -> QuantizationConfig:
    """Bits of the release, found by running it: stem, head, first time layer, shortcuts and downsamplers stay float.

    The attention of LDM's unconditional networks is Conv1d, which the release does not quantize; the inputs of the second
    time layer and of the first residual convolution stay float too.
    """
    both, none, weight_only = LayerBits(weight, activation), LayerBits(), LayerBits(weight, None)
    float_roles = {Role.STEM, Role.HEAD, Role.SHORTCUT, Role.DOWNSAMPLE}
    if fuses_qkv:
        float_roles |= {Role.ATTN_QKV, Role.ATTN_OUT}
    return QuantizationConfig(
        {role.value: none if role in float_roles else both for role in Role},
        AttentionBits(),
        {
            "time_embedding.linear_1": none,
            "time_embedding.linear_2": weight_only,
            "down_blocks.0.resnets.0.conv1": weight_only,
        },
    )


def recipe_of(reference: Mapping[str, Any], iterations: int) -> ReconstructionConfig:
    """Settings of the original's learning."""
    recipe = reference["recipe"]
    annealing = Annealing(recipe["warmup"], float(recipe["b_range"][0]), float(recipe["b_range"][1]))
    rounding = LearnRounding(1e-3, recipe["w"], annealing)
    return ReconstructionConfig(iterations, recipe["batch_size"], Lp(recipe["p"]), QuantizedInputs(), rounding=rounding)


class Forgetful:
    """Keeps nothing and says nothing: this comparison is short."""

    def get(self, unit: str) -> UnitResult | None:
        """Nothing was kept."""
        return None

    def put(self, unit: str, learned: UnitResult, report: UnitReport) -> None:
        pass

    def scoped(self, name: str) -> "Forgetful":
        return self

    def on_start(self, units: int) -> None:
        pass

    def on_progress(self, name: str, done: int, total: int) -> None:
        pass

    def on_iteration_end(self, unit: str, iteration: int, iterations: int, loss: float) -> None:
        pass

    def on_unit_end(self, unit: str, report: UnitReport | None) -> None:
        """Log the errors and the time."""
        if report is not None:
            logging.info(
                "%-48s error %.4f -> %.4f  %.1f s", unit, report.error_before, report.error_after, report.seconds
            )


def read(tensors: Mapping[str, Tensor], part: str, timesteps: list[int]) -> CalibrationSet:
    """One of the two data sets of the folder; `.c` is cross-attention context."""
    t = tensors[f"{part}.t"].round().long()
    step = TimestepContext(timesteps).step_indices(t)
    context = {"encoder_hidden_states": tensors[f"{part}.c"]} if f"{part}.c" in tensors else {}
    return CalibrationSet(tensors[f"{part}.x"], t, step, torch.arange(len(t)), context)


@torch.no_grad()
def output_error(model: nn.Module, data: CalibrationSet, expected: Tensor) -> float:
    """Mean squared error of the outputs over the variance of the float ones, averaged over steps as the original does."""
    outputs = outputs_of(model, data)
    errors, variances = [], []
    for step in data.step.unique():
        rows = data.step == step
        errors.append((outputs[rows] - expected[rows]).square().mean())
        variances.append(expected[rows].var())
    return float(torch.stack(errors).mean() / torch.stack(variances).mean())


class Phases:
    """CPU seconds of named phases."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Add the CPU seconds of a block to a phase."""
        start = time.process_time()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.process_time() - start


def reference_phases(run: Mapping[str, Any]) -> dict[str, float]:
    """The original's seconds under our phase names; its phases are wall time, so they are scaled to its CPU total."""
    s = run["seconds"]
    scale = s["total_cpu"] / s["total_wall"]
    return {
        "weight grids": s["weight_init_forward"] * scale,
        "reconstruction (capture + learning)": (s["capture"] + s["optimisation"]) * scale,
        "activation ranges": s["act_calibration_forwards"] * scale,
        "total": s["total_cpu"],
    }


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
    recipe = reference["recipe"]
    iterations = args.iterations or recipe["iters"]
    tensors = load_file(args.folder / "data.safetensors")
    float_unet = compvis_unet.load_unet(reference["architecture"], load_file(args.folder / "init_state.safetensors"))
    timesteps = [int(t) for t in tensors["tsteps"].tolist()]
    timesteps = sorted(timesteps, reverse=True)
    calibration, held = read(tensors, "cali", timesteps), read(tensors, "held", timesteps)
    deviation = float((outputs_of(float_unet, calibration) - tensors["fp_out"]).abs().max())
    parts = read_structure(float_unet, {k: v[:1] for k, v in calibration.inputs(torch.device("cpu")).items()})
    fuses_qkv = is_unconditional_ldm(reference["architecture"])
    plan = released_plan(recipe["w_bits"], recipe["a_bits"], fuses_qkv)
    resolved = resolve(
        plan, parts, tuple(attentions(float_unet)), ScalePlan(PerStepConfig(), PerStepConfig()), tuple(timesteps)
    )

    phases, quiet = Phases(), Forgetful()
    start = time.process_time()
    with phases.timed("weight grids"):
        model = build_quantized_unet(float_unet, resolved, LpObserver(memory=2**22))
        model.calibrate_weights()
    compute = ComputeConfig(
        batch=recipe["batch_size"] * 2,
        cache_bytes=2**32,
        trainer=quiet_trainer(torch.device("cpu")),
    )
    learning = recipe_of(reference, iterations)
    with phases.timed("reconstruction (capture + learning)"):
        units = TemporalAware()(parts, frozenset(model.weight_layers()))
        task = ReconstructionContext(model, float_unet, parts, calibration, compute, args.seed, quiet, quiet)
        reconstruct(task, units, learning)
    quality_start = time.process_time()
    weights_only = [
        output_error(model, calibration, tensors["fp_out"]),
        output_error(model, held, tensors["fp_out_held"]),
    ]
    quality = time.process_time() - quality_start
    with phases.timed("activation ranges"):
        CalibrateRanges(recipe["samples_per_step"], EveryKth()).ranges(model, calibration, args.seed)
    total = time.process_time() - start - quality
    phases.seconds["total"] = total
    both = [output_error(model, calibration, tensors["fp_out"]), output_error(model, held, tensors["fp_out_held"])]
    cosine = statistics.mean(row["cosine"] for row in temporal_feature_error(model, float_unet, parts))
    with tempfile.TemporaryDirectory() as folder:
        size = serialization.save(model, Path(folder) / "quantized.safetensors")
    fp32 = 4 * sum(p.numel() for p in float_unet.parameters())
    own_plan = QuantizationConfig(
        {
            role.value: LayerBits(8 if role in (Role.STEM, Role.HEAD) else recipe["w_bits"], recipe["a_bits"])
            for role in Role
        }
    )
    own_size = own_policy_size(
        float_unet,
        resolve(own_plan, parts, (), ScalePlan(PerStepConfig(), StaticConfig()), tuple(timesteps)),
        calibration,
    )

    runs = [run for run in reference["runs"].values() if run["iters"] == iterations]
    return print_tables(
        runs,
        phases.seconds,
        weights_only,
        both,
        cosine,
        size / fp32,
        own_size / fp32,
        deviation,
        coverage(resolved, parts),
    )


def is_unconditional_ldm(architecture: Mapping[str, Any]) -> bool:
    """Whether the original's attention is a Conv1d (LDM without a spatial transformer)."""
    return "kwargs" in architecture and not architecture["kwargs"].get("use_spatial_transformer")


@torch.no_grad()
def outputs_of(unet: nn.Module, data: CalibrationSet) -> Tensor:
    """Outputs over a whole set."""
    return torch.cat(
        [unet(**data[slice(i, i + 32)].inputs(torch.device("cpu"))).sample for i in range(0, len(data), 32)]
    )


def own_policy_size(float_unet: nn.Module, plan: Any, data: CalibrationSet) -> int:
    """Bytes of the artefact when our own default policy quantizes the same network."""
    model = build_quantized_unet(float_unet, plan, LpObserver(candidates=1))
    model.calibrate_weights()
    for layer in model.weight_layers():
        model.freeze(layer)
    CalibrateRanges(32, EveryKth()).ranges(model, data, 0)
    with tempfile.TemporaryDirectory() as folder:
        return serialization.save(model, Path(folder) / "quantized.safetensors")


def print_tables(
    runs: list[Mapping[str, Any]],
    seconds: Mapping[str, float],
    weights_only: list[float],
    both: list[float],
    cosine: float,
    size: float,
    own_size: float,
    deviation: float,
    covered: Mapping[str, Any],
) -> int:
    """Print our results next to the reference's mean and spread; return the number of bounds that are missed."""
    console = Terminal()
    console.print(f"float outputs differ from the original's by at most {deviation:.1e}")
    console.print(
        f"weights quantized: {covered['weight_share']:.1%} of all, {covered['mac_share_weights_and_inputs']:.1%} of MACs on integer operands"
    )
    missed = 0
    table = Table(title=f"simulated quantization, {len(runs)} reference runs at equal iterations", title_justify="left")
    for column in ("", "ours", "reference", "bound", ""):
        table.add_column(column, justify="left" if not column else "right")

    def row(name: str, ours: float, theirs: list[float], bound: float | None, form: str = ".4f") -> None:
        nonlocal missed
        shown = "" if not theirs else f"{statistics.mean(theirs):{form}}"
        if len(theirs) > 1:
            shown += f" ± {statistics.stdev(theirs):{form}}"
        verdict = "" if bound is None else "ok" if ours <= bound else "MISSED"
        missed += verdict == "MISSED"
        table.add_row(name, f"{ours:{form}}", shown, "" if bound is None else f"{bound:{form}}", verdict)

    quality = [run["quality"] for run in runs]
    errors = {
        "output error, weights, calibration": (weights_only[0], [q["adaround_w"]["rel"] for q in quality]),
        "output error, weights, held-out": (weights_only[1], [q["adaround_w"]["rel_held"] for q in quality]),
        "output error, w + a, calibration": (both[0], [q["adaround_wa"]["rel"] for q in quality]),
        "output error, w + a, held-out": (both[1], [q["adaround_wa"]["rel_held"] for q in quality]),
    }
    for name, (ours, theirs) in errors.items():
        spread = statistics.stdev(theirs) if len(theirs) > 1 else 0.0
        row(name, ours, theirs, statistics.mean(theirs) + 2 * spread if theirs else None, ".5f")
    row(
        "temporal feature cosine",
        cosine,
        [statistics.mean(q["adaround_wa"]["temporal_cos_per_step"]) for q in quality],
        None,
        ".5f",
    )
    for phase, ours in seconds.items():
        theirs = [reference_phases(run)[phase] for run in runs]
        row(
            f"CPU s, {phase}", ours, theirs, statistics.mean(theirs) / 2 if theirs and phase == "total" else None, ".2f"
        )
    row(
        "artefact / fp32 bytes, original's exceptions",
        size,
        [r["ckpt"]["bytes"] / r["ckpt"]["fp32_bytes"] for r in runs],
        0.27,
        ".3f",
    )
    row("artefact / fp32 bytes, our default policy", own_size, [], 0.18, ".3f")
    console.print(table)
    console.print(
        "The reference's seconds were recorded on its own machine; bench_reconstruction.py times the same recipe, "
        "written down plainly, beside ours on this one."
    )
    return missed


if __name__ == "__main__":
    with standard_streams():
        os.environ.setdefault("TQDM_DISABLE", "1")
        sys.exit(main())

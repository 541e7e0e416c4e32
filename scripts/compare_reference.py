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
from tfmq_exp.denoisers.loading import compvis_unet
from tfmq_exp.denoisers.structure import Role
from tfmq_exp.denoisers.unet import attentions, read_structure
from tfmq_exp.diagnostics.temporal_error import temporal_feature_error
from tfmq_exp.methods.activations import CalibrateRanges
from tfmq_exp.quant.observers import LpObserver
from tfmq_exp.quant.scales.per_step import PerStepConfig
from tfmq_exp.quant.scales.static import StaticConfig
from tfmq_exp.quant.timestep_context import TimestepContext
from tfmq_exp.reconstruction.callbacks import UnitReport, UnitResult
from tfmq_exp.reconstruction.context import ComputeConfig, ReconstructionContext, quiet_trainer
from tfmq_exp.reconstruction.inputs import QuantizedInputs
from tfmq_exp.reconstruction.loop import reconstruct
from tfmq_exp.reconstruction.module import LearnRounding, ReconstructionConfig
from tfmq_exp.reconstruction.objectives import Annealing, Lp
from tfmq_exp.reconstruction.units import TemporalAware
from tfmq_exp.surgery import serialization
from tfmq_exp.surgery.build import build_quantized_unet
from tfmq_exp.surgery.config import AttentionBits, LayerBits, QuantizationConfig
from tfmq_exp.surgery.quantized_unet import QuantizedUNet
from tfmq_exp.surgery.resolve import coverage, resolve
from tfmq_exp.surgery.scales import ScalePlan

# Output errors: where they are in the reference's results.
ERRORS = {
    "output error, weights, calibration": ("adaround_w", "rel"),
    "output error, weights, held-out": ("adaround_w", "rel_held"),
    "output error, w + a, calibration": ("adaround_wa", "rel"),
    "output error, w + a, held-out": ("adaround_wa", "rel_held"),
}


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


class NoCheckpoints:
    """Keeps nothing of a unit, and logs its errors and its time."""

    def get(self, unit: str) -> UnitResult | None:
        return None

    def scoped(self, name: str) -> "NoCheckpoints":
        return self

    def ignore(self, *args: object) -> None:
        """Nothing is kept or shown while units are learned: this comparison is short."""

    put = on_start = on_progress = on_iteration_end = ignore

    def on_unit_end(self, unit: str, report: UnitReport | None) -> None:
        if report is not None:
            errors = f"error {report.error_before:.4f} -> {report.error_after:.4f}"
            logging.info("%-48s %s  %.1f s", unit, errors, report.seconds)


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


@contextmanager
def timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    """Note the CPU seconds of a block."""
    start = time.process_time()
    yield
    seconds[name] = time.process_time() - start


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
    recipe, architecture = reference["recipe"], reference["architecture"]
    iterations = args.iterations or recipe["iters"]
    tensors = load_file(args.folder / "data.safetensors")
    float_unet = compvis_unet.load_unet(architecture, load_file(args.folder / "init_state.safetensors"))
    timesteps = sorted((int(t) for t in tensors["tsteps"].tolist()), reverse=True)
    calibration, held = read(tensors, "cali", timesteps), read(tensors, "held", timesteps)
    deviation = float((outputs_of(float_unet, calibration) - tensors["fp_out"]).abs().max())
    parts = read_structure(float_unet, {k: v[:1] for k, v in calibration.inputs(torch.device("cpu")).items()})
    # LDM without a spatial transformer: the original's attention is a Conv1d
    fuses_qkv = "kwargs" in architecture and not architecture["kwargs"].get("use_spatial_transformer")
    plan, scales = released_plan(recipe["w_bits"], recipe["a_bits"], fuses_qkv), PerStepConfig()
    resolved = resolve(plan, parts, tuple(attentions(float_unet)), ScalePlan(scales, scales), tuple(timesteps))

    def errors() -> list[float]:
        data = ((calibration, tensors["fp_out"]), (held, tensors["fp_out_held"]))
        return [output_error(model, inputs, expected) for inputs, expected in data]

    seconds, quiet = dict[str, float](), NoCheckpoints()
    with timed(seconds, "weight grids"):
        model = build_quantized_unet(float_unet, resolved, LpObserver(memory=2**22))
        model.calibrate_weights()
    trainer = quiet_trainer(torch.device("cpu"))
    compute = ComputeConfig(batch=recipe["batch_size"] * 2, cache_bytes=2**32, trainer=trainer)
    learning = recipe_of(reference, iterations)
    with timed(seconds, "reconstruction (capture + learning)"):
        units = TemporalAware()(parts, frozenset(model.weight_layers()))
        task = ReconstructionContext(model, float_unet, parts, calibration, compute, args.seed, quiet, quiet)
        reconstruct(task, units, learning)
    weights_only = errors()
    with timed(seconds, "activation ranges"):
        CalibrateRanges(recipe["samples_per_step"], EveryKth()).ranges(model, calibration, args.seed)
    seconds["total"] = sum(seconds.values())
    ours = dict(zip(ERRORS, weights_only + errors(), strict=True))
    ours["temporal feature cosine"] = statistics.mean(
        row["cosine"] for row in temporal_feature_error(model, float_unet, parts)
    )
    bits = {
        role.value: LayerBits(8 if role in (Role.STEM, Role.HEAD) else recipe["w_bits"], recipe["a_bits"])
        for role in Role
    }
    own_scales = ScalePlan(PerStepConfig(), StaticConfig())
    own_plan = resolve(QuantizationConfig(bits), parts, (), own_scales, tuple(timesteps))
    own = build_quantized_unet(float_unet, own_plan, LpObserver(candidates=1))
    own.calibrate_weights()
    CalibrateRanges(32, EveryKth()).ranges(own, calibration, 0)
    fp32 = 4 * sum(p.numel() for p in float_unet.parameters())
    sizes = {"original's exceptions": stored_bytes(model) / fp32, "our default policy": stored_bytes(own) / fp32}
    covered, console = coverage(resolved, parts), Terminal()
    console.print(f"float outputs differ from the original's by at most {deviation:.1e}")
    shares = covered["weight_share"], covered["mac_share_weights_and_inputs"]
    console.print("weights quantized: {:.1%} of all, {:.1%} of MACs on integer operands".format(*shares))
    runs = [run for run in reference["runs"].values() if run["iters"] == iterations]
    return print_table(runs, ours, seconds, sizes, console)


@torch.no_grad()
def outputs_of(unet: nn.Module, data: CalibrationSet) -> Tensor:
    """Outputs over a whole set."""
    return torch.cat(
        [unet(**data[slice(i, i + 32)].inputs(torch.device("cpu"))).sample for i in range(0, len(data), 32)]
    )


def stored_bytes(model: QuantizedUNet) -> int:
    """Bytes of the artefact."""
    for site in model.weight_layers():
        model.freeze(site)
    with tempfile.TemporaryDirectory() as folder:
        return serialization.save(model, Path(folder) / "quantized.safetensors")


def print_table(
    runs: Sequence[Mapping[str, Any]],
    ours: Mapping[str, float],
    seconds: Mapping[str, float],
    sizes: Mapping[str, float],
    console: Terminal,
) -> int:
    """Print our results next to the reference's mean and spread; return the number of bounds that are missed.

    Args:
        runs: the reference's, at equal iterations.
        ours: output errors and the temporal features' cosine, by name.
        seconds: of CPU, by phase.
        sizes: of artefacts over the float network's, by policy.
        console: to print to.
    """
    missed = 0
    table = Table(title=f"simulated quantization, {len(runs)} reference runs at equal iterations", title_justify="left")
    for column in ("", "ours", "reference", "bound", ""):
        table.add_column(column, justify="left" if not column else "right")

    def row(name: str, own: float, theirs: Sequence[float], bound: float | None, form: str) -> None:
        nonlocal missed
        shown = f"{statistics.mean(theirs):{form}}" if theirs else ""
        shown += f" ± {statistics.stdev(theirs):{form}}" if len(theirs) > 1 else ""
        verdict = "" if bound is None else "ok" if own <= bound else "MISSED"
        missed += verdict == "MISSED"
        table.add_row(name, f"{own:{form}}", shown, "" if bound is None else f"{bound:{form}}", verdict)

    for name, value in ours.items():
        if name in ERRORS:
            part, key = ERRORS[name]
            theirs = [run["quality"][part][key] for run in runs]
            spread = statistics.stdev(theirs) if len(theirs) > 1 else 0.0
            row(name, value, theirs, statistics.mean(theirs) + 2 * spread if theirs else None, ".5f")
        else:
            theirs = [statistics.mean(run["quality"]["adaround_wa"]["temporal_cos_per_step"]) for run in runs]
            row(name, value, theirs, None, ".5f")
    for phase, value in seconds.items():
        theirs = [reference_phases(run)[phase] for run in runs]
        row(
            f"CPU s, {phase}",
            value,
            theirs,
            statistics.mean(theirs) / 2 if theirs and phase == "total" else None,
            ".2f",
        )
    released = [run["ckpt"]["bytes"] / run["ckpt"]["fp32_bytes"] for run in runs]
    for (policy, size), theirs, bound in zip(sizes.items(), (released, []), (0.27, 0.18), strict=True):
        row(f"artefact / fp32 bytes, {policy}", size, theirs, bound, ".3f")
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

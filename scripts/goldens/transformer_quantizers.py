"""Quantizers of programs for diffusion transformers against their numbers: Q-DiT, its GPTQ, PTQ4DiT, SVDQuant, ViDiT-Q."""

from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import linear

from goldens.comparing import EXACT, ROUNDING, DamagedError, Group, Record, coverage, reading
from goldens.families import read_json, read_recorded
from goldens.ptq4dit import check_ptq4dit
from goldens.svdquant import check_svdquant
from tfmq_exp.quant.functional import dequantize, fake_quantize
from tfmq_exp.quant.gptq import ColumnGroups, gptq, gptq_in_groups, without_dead_inputs
from tfmq_exp.quant.grids.groups import group_range, grouped, quantize_groups, ungrouped
from tfmq_exp.quant.grids.released import ReleasedGrid
from tfmq_exp.quant.grids.search import least_error, shrunken_ranges
from tfmq_exp.quant.spec import QParams, QuantSpec
from tfmq_exp.quant.transforms.channel_balance import balance, channel_maxima, running_maxima

GPTQ, OUTPUT = 1e-5, 1e-5  # absolute
QDIT_GRID = ReleasedGrid(smallest_range=1e-5, clamp_zero_point=True)
GPTQ_GRID = ReleasedGrid(all_levels=True)
VIDITQ_WEIGHTS, VIDITQ_TOKENS = ReleasedGrid(), ReleasedGrid(smallest_scale=1e-6, all_or_none=True)
DAMPING, BLOCK = 0.01, 128  # of the original's GPTQ
POWER = 2.4  # of the norm of Q-DiT's search


def spec_of(case: Record) -> QuantSpec:
    """The integers of a case."""
    return QuantSpec(case["bits"], "symmetric" if case["sym"] else "affine")


def check_qdit(settings: Record, recorded: Record) -> Iterator[Group]:
    """Weights in groups and activations per token and group."""
    groups = {
        kind: Group(f"qdit: {kind}", EXACT)
        for kind in ("weights, max", "weights, mse", "activations", "channel groups")
    }
    for name, case in settings["cases"].items():
        x, spec, size = recorded[name.split(".")[0]], spec_of(case), case["group"] or None
        method, rows, clip = case.get("method", "max"), case.get("channel_group", 1), case.get("clip", 1.0)
        values = grouped(x, size, rows if size else 1)
        lo, hi = group_range(values, zero=False)
        if method == "mse":
            q = least_error(values, (QDIT_GRID(*ends, spec) for ends in shrunken_ranges(lo, hi)), spec, POWER)
        else:
            share = clip if size else 1.0  # the original ignores it without groups
            q = QDIT_GRID(lo * share, hi * share, spec)
        kind = "activations" if "method" not in case else f"weights, {method}" if rows == 1 else "channel groups"
        ours = ungrouped(fake_quantize(values, q, spec), rows if size else 1)
        groups[kind].compare(ours, recorded[name])
        if kind == "activations":
            groups[kind].compare(quantize_groups(x, spec, size, zero=False, place=QDIT_GRID), recorded[name])
    yield from (group for group in groups.values() if group.comparisons)


def check_gptq(settings: Record, recorded: Record) -> Iterator[Group]:
    """Moments of the inputs, then weights per row and in groups."""
    weight, moments = recorded["weight"], recorded["hessian"]
    if "inputs" in recorded:
        own, inputs = Group("gptq: second moments", ROUNDING), recorded["inputs"]
        x = inputs.flatten(0, -2).double()
        own.compare(2 / inputs.shape[:2].numel() * x.T @ x, moments)
        yield own
    whole, alive, moments = weight[None], *without_dead_inputs(weight[None], moments[None])
    rows, groups = Group("gptq: rows", GPTQ, absolute=True), Group("gptq: groups", GPTQ, absolute=True)
    for name, case in settings["cases"].items():
        spec, size = spec_of(case), case["group"]

        def place(values: Tensor, spec: QuantSpec = spec) -> QParams:
            return GPTQ_GRID(*group_range(values), spec)

        if size < 1:
            q = place(whole)
            codes = gptq(alive, moments, q, spec, damping=DAMPING, activation_order=False, block=BLOCK)
        else:
            released = ColumnGroups(size, place, before_block=True)
            codes, q = gptq_in_groups(alive, moments, released, spec, damping=DAMPING, block=BLOCK)
        (rows if size < 1 else groups).compare(dequantize(codes, q)[0], recorded[name])
    yield from (group for group in (rows, groups) if group.comparisons)


def check_viditq(settings: Record, recorded: Record) -> Iterator[Group]:
    """Running maxima, balanced channels, and outputs with dynamic ranges that the batch shares."""
    inputs, weight, bias = (recorded[name] for name in ("inputs", "weight", "bias"))
    maxima, factors = Group("viditq: running maxima", ROUNDING), Group("viditq: balance", ROUNDING)
    scales, zeros = Group("viditq: weight scales", ROUNDING), Group("viditq: weight zero points", EXACT)
    full, out = Group("viditq: full precision", OUTPUT, absolute=True), Group("viditq: outputs", OUTPUT, absolute=True)
    for name, case in settings["cases"].items():
        x, w, alpha = inputs, weight, case["alpha"]
        if alpha is not None:
            running = None
            for batch in inputs:
                running = running_maxima(running, batch, case["momentum"])
            assert running is not None
            s = balance(running, channel_maxima(weight), alpha, 1 - alpha)
            for group, ours, key in ((maxima, running, "act_scale"), (factors, s, "channel_scale")):
                golden = recorded[f"{name}.{key}"]
                group.compare(ours / golden, torch.ones_like(golden))
            x, w = inputs / s, weight * s
            full.compare(linear(x[-1], w, bias), recorded[f"{name}.float"])
        spec, act_spec = QuantSpec(case["weight_bits"]), QuantSpec(case["act_bits"])
        q = VIDITQ_WEIGHTS(*group_range(w), spec)
        scales.compare(q.scale, recorded[f"{name}.weight_delta"])
        zeros.compare(q.zero_point, recorded[f"{name}.weight_zero"])
        for batch, golden in zip(x, recorded[f"{name}.out"], strict=True):
            tokens = quantize_groups(batch, act_spec, joint=True, place=VIDITQ_TOKENS)
            out.compare(linear(tokens, fake_quantize(w, q, spec), bias), golden)
    yield from (group for group in (maxima, factors, full, scales, zeros, out) if group.comparisons)


PROGRAMS: dict[str, Callable[[Record, Record], Iterator[Group]]] = {
    "qdit": check_qdit,
    "gptq": check_gptq,
    "ptq4dit": check_ptq4dit,
    "svdquant": check_svdquant,
    "viditq": check_viditq,
}  # by the names of their files


def check_transformer_quantizers(folder: Path) -> list[Group]:
    """Every comparison of the programs that a folder has, and whether every tensor took part.

    Raises:
        DamagedError: no program is there, or something of one is missing or cannot be read.
    """
    groups, present, read = list[Group](), set[str](), set[str]()
    for name, check in PROGRAMS.items():
        files = folder / f"{name}.json", folder / f"{name}.safetensors"
        if not any(file.is_file() for file in files):
            continue
        settings, recorded = read_json(files[0]), read_recorded(files[1])
        with reading(files[1]):
            groups += check(settings, recorded)
        present |= {f"{name}: {key}" for key in recorded}
        read |= {f"{name}: {key}" for key in recorded.read}
    if not groups:
        raise DamagedError(f"{folder} has no file of {', '.join(PROGRAMS)}")
    return [*groups, coverage("quantizers: tensors read", present, read)]

"""SVDQuant's grids, balance search and low-rank branches against the original program's numbers."""

import re
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor
from torch.nn.functional import linear

from goldens.comparing import EXACT, ROUNDING, DamagedError, Group, Record
from tfmq_exp.quant.functional import dequantize, qparams_from_range, quantize
from tfmq_exp.quant.grids.groups import group_range, grouped, quantize_groups, ungrouped
from tfmq_exp.quant.spec import QuantSpec
from tfmq_exp.quant.transforms.channel_balance import balance, balance_exponents, channel_maxima, search_balance
from tfmq_exp.quant.transforms.low_rank import Branch, iterated_low_rank, low_rank, low_rank_linear, shared_low_rank

FACTORS, TENSORS, TIES, ERRORS, OUTPUT = 1e-5, 1e-5, 1e-3, 1e-4, 1e-5  # TIES: share of the values that may differ
SCHEMES = {"sint": "symmetric", "uint": "unsigned"}
CODES = re.compile(r"(?P<tensor>\w+)\.(?P<scheme>sint|uint)(?P<bits>\d+)(?P<channel>\.channel)?\.dequant")


SHARED = re.compile(r"shared\.\d+\.weight")


class Ties(Group):
    """Quantized tensors: the share of values that are not the original's, as a value between two codes may be."""

    def add(self, ours: Tensor, golden: Tensor) -> None:
        """Add one comparison."""
        differs = (ours - golden).abs() > TENSORS * golden.abs().max()
        self.compare(float(differs.double().mean()), 0.0)
        self.values += golden.numel() - 1


def compare_each(group: Group, ours: Sequence[float], golden: Tensor) -> None:
    """Compare numbers, each relative to its own golden one."""
    found = torch.tensor(ours, dtype=torch.float64)
    group.compare(found / golden if len(found) == len(golden) else found, torch.ones_like(golden))


def grids(recorded: Record, size: int) -> Iterator[Group]:
    """Codes, scales and values of tensors in groups, or with one group per row."""
    scales, values = Group("svdquant: codes and scales", EXACT), Group("svdquant: quantized tensors", EXACT)
    for key in list(recorded):
        found = CODES.fullmatch(key)
        if found is None or found["tensor"] not in recorded:
            continue
        spec = QuantSpec(int(found["bits"]), SCHEMES[found["scheme"]])  # type: ignore[arg-type]
        groups = grouped(recorded[found["tensor"]], None if found["channel"] else size)
        q = qparams_from_range(*group_range(groups), spec)
        codes, name = quantize(groups, q, spec), key.removesuffix(".dequant")
        values.compare(ungrouped(dequantize(codes, q)), recorded[key])
        for ours, part in ((ungrouped(codes), "codes"), (q.scale, "scale")):
            if f"{name}.{part}" in recorded:
                scales.compare(ours, recorded[f"{name}.{part}"])
    yield from (scales, values)


def squared_error(
    x: Tensor, weight: Tensor, quantized: Callable[[Tensor], Tensor]
) -> Callable[[Branch, Tensor], float]:
    """The error of a layer's output, as a function of its branch and the quantized rest of its weight."""
    expected, inputs = linear(x, weight), quantized(x)
    return lambda branch, rest: float((low_rank_linear(x, inputs, branch, rest) - expected).double().square().sum())


def searches(settings: Record, recorded: Record, quantized: Callable[[Tensor], Tensor]) -> Iterator[Group]:
    """Balance by exponents, and the search among them with a branch of one SVD."""
    x, weight = recorded["input"], recorded["weight"]
    maxima = channel_maxima(x), channel_maxima(weight)
    factors = Group("svdquant: balance", ROUNDING)
    for key in [key for key in recorded if key.startswith("smooth.")]:
        found = re.fullmatch(r"smooth\.alpha([\d.]+)\.beta([\d.]+)", key)
        if found is None:
            raise DamagedError(f"expected smooth.alpha<number>.beta<number>, got {key!r}")
        factors.compare(balance(*maxima, float(found[1]), float(found[2])), recorded[key])

    def error(scale: Tensor) -> float:
        balanced = weight * scale
        branch = low_rank(balanced, settings["rank"])
        return squared_error(x / scale, balanced, quantized)(branch, quantized(balanced - branch.weight))

    errors, best = Group("svdquant: errors of the search", ERRORS), Group("svdquant: best of the search", EXACT)
    scales = []
    for name in [key.removesuffix(".pairs") for key in settings if key.endswith(".pairs")]:
        exponents = [(float(alpha), float(beta)) for alpha, beta in settings[f"{name}.pairs"]]
        found = search_balance(*maxima, exponents, error)
        golden = recorded[f"{name}.errors"]
        compare_each(errors, found.errors, golden)
        best.compare(found.best, settings[f"{name}.best"])
        best.compare(balance_exponents((len(exponents) + 1) // 2), exponents)  # type: ignore[arg-type]
        scales.append(found.scale)
        factors.compare(found.scale, recorded[f"{name}.scale"])
    # balanced by the result of one search; which one is not said
    golden = recorded["smoothed.weight"]
    scale = min(scales, key=lambda scale: float((weight * scale - golden).abs().max()))
    factors.compare(weight * scale, golden)
    factors.compare(x / scale, recorded["smoothed.input"])
    yield from (factors, errors, best)


def branches(settings: Record, recorded: Record, quantized: Callable[[Tensor], Tensor]) -> Iterator[Group]:
    """Branches of one weight, alone and iterated, and of several that share their input."""
    products, ties = Group("svdquant: branches", FACTORS), Ties("svdquant: share of other codes", TIES, absolute=True)
    errors, counts = Group("svdquant: errors of the iterations", ERRORS), Group("svdquant: iterations", EXACT)
    outputs, rank, weight = Group("svdquant: outputs", OUTPUT), settings["rank"], recorded["weight"]
    if "plain.lowrank.a" in recorded:
        plain = low_rank(weight, rank)
        products.compare(plain.weight, stored(recorded, "plain.lowrank.b", "plain.lowrank.a").weight)
        products.compare(weight - plain.weight, recorded["plain.residual"])
        ties.add(quantized(weight - plain.weight), recorded["plain.residual.sint4.dequant"])
    x, weight = recorded["smoothed.input"], recorded["smoothed.weight"]
    for name in [key.removesuffix(".iterations") for key in settings if key.endswith(".iterations")]:
        most = int(name.rpartition("iters")[2])
        found = iterated_low_rank(weight, rank, quantized, squared_error(x, weight, quantized), most)
        golden, branch = recorded[f"{name}.errors"], stored(recorded, f"{name}.b", f"{name}.a")
        counts.compare(len(found.errors), settings[f"{name}.iterations"])
        compare_each(errors, found.errors, golden)
        products.compare(found.branch.weight, recorded[f"{name}.effective"])
        products.compare(found.branch.weight, branch.weight)
        products.compare(weight - found.branch.weight, recorded[f"{name}.residual"])
        rest = recorded[f"{name}.residual.sint4.dequant"]
        ties.add(found.quantized, rest)
        outputs.compare(low_rank_linear(x, quantized(x), branch, rest), recorded[f"{name}.output"])
    weights = [recorded[f"shared.{i}.weight"] for i in range(len([k for k in recorded if SHARED.fullmatch(k)]))]
    for i, (weight, branch) in enumerate(zip(weights, shared_low_rank(weights, rank) if weights else [], strict=True)):
        products.compare(branch.weight, stored(recorded, f"shared.{i}.b", "shared.a").weight)
        ties.add(quantized(weight - branch.weight), recorded[f"shared.{i}.residual.sint4.dequant"])
    yield from (products, ties, errors, counts, outputs)


def stored(recorded: Record, up: str, down: str) -> Branch:
    """The original's branch; its factors are those of ours up to signs."""
    return Branch(recorded[down], recorded[up])


def check_svdquant(settings: Record, recorded: Record) -> Iterator[Group]:
    """Grids, balance, branches, and outputs with neither."""
    spec, size = QuantSpec(settings["bits"], "symmetric"), settings["group"]

    def quantized(x: Tensor) -> Tensor:
        return quantize_groups(x, spec, size)

    yield from grids(recorded, size)
    yield from searches(settings, recorded, quantized)
    yield from branches(settings, recorded, quantized)
    x, weight = recorded["input"], recorded["weight"]
    plain = Group("svdquant: outputs without branch", OUTPUT)
    plain.compare(linear(x, weight), recorded["output_float"])
    plain.compare(linear(quantized(x), quantized(weight)), recorded["output_plain_w4a4"])
    relative = Group("svdquant: squared relative errors", ERRORS)
    full = recorded["output_float"]
    for name, golden in settings["relative_output_error"].items():
        relative.compare(float((recorded[name] - full).square().sum() / full.square().sum()), golden)
    yield from (plain, relative)

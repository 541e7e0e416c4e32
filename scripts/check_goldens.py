"""Compare our arithmetic with numbers that the original TFMQ-DM program made.

    python scripts/check_goldens.py quantizers DIR

DIR holds `meta.json`, `timestep_maps.json` and the safetensors files that `meta.json` describes; `tests/goldens/README.md`
says what is in them. Shapes, seeds and settings are read from the files, so any set of the same layout can be checked.
Every tensor has to be read by some comparison. Differences are relative to the largest magnitude of the golden tensor.

Exit status: 0 all within tolerance, 1 some comparison is not, 2 the folder is missing or damaged.
"""

import argparse
import json
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.embeddings import get_timestep_embedding
from rich.console import Console
from rich.table import Table
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from tfmq_exp.quant.clock import StepClock
from tfmq_exp.quant.functional import fake_quantize, qparams_from_range
from tfmq_exp.quant.quantizers.affine import WeightQuantizer
from tfmq_exp.quant.quantizers.base import Mode
from tfmq_exp.quant.ranges import Histogram, KLSearch, LpSearch, MinMax, RangeEstimator
from tfmq_exp.quant.rounding import AdaRound, inverse_rectified_sigmoid, rectified_sigmoid, rounding_penalty
from tfmq_exp.quant.sources.static import Static
from tfmq_exp.quant.spec import QParams, QuantSpec
from tfmq_exp.reconstruction.objectives import Annealing, lp_loss
from tfmq_exp.sampling.sampler import DDIM

RELEASED = LpSearch(widen=False)
ESTIMATORS: dict[str, RangeEstimator] = {
    "minmax": MinMax(),
    "mse": RELEASED,
    "kl": KLSearch(),
    "hist": Histogram(positive_only=True),
}
EXACT, ROUNDING, LEARNED = 0.0, 1e-6, 4e-6  # same bits; other order of float32 sums; after many optimiser steps
SCHEDULE = {"num_train_timesteps": 1000, "beta_start": 0.0015, "beta_end": 0.0195, "beta_schedule": "scaled_linear"}


class DamagedError(Exception):
    """The folder lacks something, or something in it cannot be read."""


class Record(dict[str, Any]):
    """A dictionary that remembers what was read, and names what it lacks."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.read: set[str] = set()

    def __getitem__(self, key: str) -> Any:
        self.read.add(key)
        return super().__getitem__(key)

    def __missing__(self, key: str) -> Any:
        raise DamagedError(f"there is no {key!r} in the goldens")


@dataclass
class Goldens:
    """A folder's tensors by name, and its records."""

    tensors: Record
    meta: Record
    timesteps: Record

    @classmethod
    def load(cls, folder: Path) -> "Goldens":
        """Read every file of a folder.

        Raises:
            DamagedError: a missing folder, or a file that is missing or cannot be parsed.
        """
        try:
            meta, timesteps = (
                json.loads((folder / name).read_text(), object_hook=Record) for name in ("meta.json", "timestep_maps.json")
            )
            files = sorted(folder.glob("*.safetensors"))
            tensors = Record({key: value for file in files for key, value in load_file(file).items()})
        except (OSError, ValueError, SafetensorError) as error:
            raise DamagedError(f"{folder} cannot be read: {error}") from error
        return cls(tensors, meta, timesteps)


class Group:
    """The comparisons of one kind: how many, and the worst of them."""

    def __init__(self, name: str, tolerance: float) -> None:
        self.name, self.tolerance = name, tolerance
        self.comparisons, self.values, self.worst, self.note = 0, 0, 0.0, ""

    def compare(self, ours: Tensor | float | Sequence[float], golden: Tensor | float | Sequence[float]) -> None:
        """Add one comparison: a tensor, a number or a list of numbers."""
        a, b = (x.detach().double() if isinstance(x, Tensor) else torch.tensor(x).double() for x in (ours, golden))
        self.comparisons += 1
        self.values += b.numel()
        if a.numel() != b.numel():
            self.worst = math.inf
            return
        difference = (a.flatten() - b.flatten()).abs().max()
        relative = float(difference / b.abs().max()) if difference else 0.0
        self.worst = max(self.worst, math.inf if math.isnan(relative) else relative)

    @property
    def ok(self) -> bool:
        """Whether something was compared and all of it is within tolerance."""
        return self.comparisons > 0 and self.worst <= self.tolerance


def spec_of(record: Record, bits: int, axis: int | None) -> QuantSpec:
    """The grid that a record describes."""
    scheme = "unsigned" if record.get("always_zero") else "symmetric" if record.get("symmetric") else "affine"
    return QuantSpec(bits, scheme, axis)


def stored(tensors: Record, key: str) -> QParams:
    """A golden scale and zero point."""
    return QParams(tensors[f"{key}.delta"], tensors[f"{key}.zero_point"])


def at(rounding: AdaRound, v: Tensor) -> AdaRound:
    """The same rounding at another point."""
    with torch.no_grad():
        rounding.v.copy_(v)
    return rounding


def weight_quantizer(weight: Tensor, bits: int, group: Group, key: str, tensors: Record) -> WeightQuantizer:
    """A quantizer placed on a weight as the release does, compared with the golden scale and zero point."""
    quantizer = WeightQuantizer(weight, QuantSpec(bits, axis=0), RELEASED)
    quantizer.observe(weight)
    quantizer.mode = Mode.QUANTIZE
    for ours, golden in zip(quantizer.qparams, stored(tensors, key), strict=True):
        group.compare(ours, golden)
    return quantizer


def place(x: Tensor, spec: QuantSpec, group: Group, key: str, tensors: Record) -> Tensor:
    """A tensor on the grid of its own range, as the release finds it; scale and zero point are compared."""
    q = qparams_from_range(*RELEASED(x, spec), spec)
    for ours, golden in zip(q, stored(tensors, key), strict=True):
        group.compare(ours, golden)
    return fake_quantize(x, q, spec)


def scalers(goldens: Goldens) -> Iterator[Group]:
    """Range estimators: scale, zero point and quantized tensor of every case, and the cases that crashed."""
    groups = {name: Group(f"scaler {name}", ROUNDING if name in ("kl", "hist") else EXACT) for name in ESTIMATORS}
    crashed = Group("scaler, original crashed", EXACT)
    for case in goldens.meta["cases"]:
        x = goldens.tensors[f"input.{case['input']}"]
        spec = spec_of(case, case["bits"], 0 if case["channel_wise"] else None)
        if case["status"] != "ok":
            q = qparams_from_range(*Histogram()(x, spec), spec)
            crashed.compare(float(torch.isfinite(fake_quantize(x, q, spec)).all() and (q.scale > 0).all()), 1.0)
            continue
        group, key, row = groups[case["scaler"]], f"scaler.{case['group']}", case["row"]
        q = qparams_from_range(*ESTIMATORS[case["scaler"]](x, spec), spec)
        golden = [goldens.tensors[f"{key}.{name}"][row] for name in ("delta", "zero_point", "dq")]
        if q.scale.numel() == golden[0].numel():  # each scale relative to itself: channels may differ by orders
            group.compare(q.scale.flatten() / golden[0], torch.ones_like(golden[0]))
        group.compare(q.scale, golden[0])
        group.compare(q.zero_point, golden[1])
        group.compare(fake_quantize(x, q, spec), golden[2])
    yield from groups.values()
    if crashed.comparisons:
        crashed.note = f"original crashed: {crashed.comparisons} cases, ours finite: {'all' if crashed.ok else 'NOT all'}"
        yield crashed


def running(goldens: Goldens) -> Iterator[Group]:
    """Running ranges over a sequence of batches, the first of which is seen twice."""
    group = Group("running range", EXACT)
    for record in goldens.meta["running"]:
        x, spec = goldens.tensors[record["x"]], spec_of(record, record["bits"], None)
        key, golden_ranges = record["key"], {}
        for name in ("x_min", "x_max", "delta", "zero_point"):
            golden_ranges[name] = goldens.tensors[f"{record['key']}.{name}"]
        source = Static(spec, momentum=record["momentum"])
        for row, batch in enumerate((x[0], *x)):
            source.observe(batch)
            ours = {"x_min": source.lo, "x_max": source.hi, "delta": source.scale, "zero_point": source.zero_point}
            if row == 0:  # the release starts from its scaler and replaces that by min-max at the first update
                q = qparams_from_range(*ESTIMATORS[record["init_scaler"]](batch, spec), spec)
                ours |= {"delta": q.scale, "zero_point": q.zero_point}
            for name, golden in golden_ranges.items():
                group.compare(ours[name], golden[row])
        group.compare(fake_quantize(x[-1], source(x[-1]), spec), goldens.tensors[f"{key}.y_last"])
    yield group


def adaround(goldens: Goldens) -> Iterator[Group]:
    """Learned rounding: start, soft and hard weights, and the gradient of V."""
    group, exact = Group("AdaRound, soft and gradient", ROUNDING), Group("AdaRound, hard", EXACT)
    for record in goldens.meta["adaround"]:
        tensors = goldens.tensors
        golden = {name: tensors[f"{record['key']}.{name}"] for name in ADAROUND_NAMES}
        weight, spec = tensors[record["input"]], spec_of(record, record["bits"], 0)
        q = qparams_from_range(*ESTIMATORS[record["scaler"]](weight, spec), spec)
        rounding = AdaRound(weight, q, spec)
        exact.compare(q.scale, golden["delta"])
        exact.compare(q.zero_point, golden["zero_point"])
        exact.compare(fake_quantize(weight, q, spec), golden["nearest"])
        group.compare(rounding.v, golden["alpha_init"])
        group.compare(rounding.h, golden["soft_init"])
        rounding.harden()
        exact.compare(fake_quantize(weight, q, spec, rounding), golden["hard_init"])
        exact.compare(fake_quantize(weight, q, spec, at(rounding, golden["alpha_pert"])), golden["hard_pert"])
        soft = rounding.weight()
        soft.backward(golden["grad_out"])
        group.compare(soft, golden["soft_out_pert"])
        group.compare(rounding.v.grad, golden["alpha_grad"])
    group.compare(rectified_sigmoid(goldens.tensors["adaround.soft_grid.alpha"]), goldens.tensors["adaround.soft_grid.h"])
    yield from (group, exact)


ADAROUND_NAMES = (
    "delta zero_point nearest alpha_init soft_init hard_init alpha_pert hard_pert soft_out_pert grad_out alpha_grad".split()
)


def temperature(goldens: Goldens) -> Iterator[Group]:
    """The penalty's exponent and when it counts."""
    group = Group("annealing", EXACT)
    for record in goldens.meta["temperature"]:
        annealing = Annealing(record["warmup"], *record["b_range"])
        group.compare([annealing.beta(count, record["iters"]) for count in record["counts"]], record["b"])
        active = [float(annealing.active(count, record["iters"])) for count in record["counts"]]
        group.compare(active, [float(flag) for flag in record["round_loss_active"]])
    yield group


def loss(goldens: Goldens) -> Iterator[Group]:
    """Output error and rounding penalty of a layer and of a block, and the gradient of V."""
    group, tensors, meta = Group("loss", ROUNDING), goldens.tensors, goldens.meta["loss"]
    for record in meta["lp"]:
        prediction, target = (tensors[f"{record['tensor']}.{name}"] for name in ("pred", "tgt"))
        error = lp_loss(prediction, target, record["p"], dim=1)
        group.compare(error, record["none_reduction"])
        group.compare(error / target.shape[1], record["all_reduction"])
    layers = {name: loaded_rounding(tensors, f"loss.{name}") for name in ("layer", "block.conv2", "block.emb")}
    annealing, iterations = Annealing(meta["warmup"], *meta["b_range"]), meta["iters"]
    for record in meta["values"]:
        name, count = record["object"], record["count"]
        out, learned = loss_forward(tensors, name, layers)
        error = lp_loss(out, tensors[f"loss.{name}.tgt"], meta["p"], dim=1)
        penalty = torch.zeros(())
        if annealing.active(count, iterations):
            beta = annealing.beta(count, iterations)
            penalty = meta["w"] * sum(rounding_penalty(rounding.h, beta) for rounding in learned)
        for ours, golden in ((annealing.beta(count, iterations), "b"), (error + penalty, "total"), (error, "rec")):
            group.compare(ours, record[golden])
        if record["round"] or penalty:  # the golden is a difference of two rounded numbers
            group.compare(penalty + error, record["round"] + record["rec"])
        group.compare(out, tensors[f"loss.{name}.out"])
        if f"loss.{name}.count{count}.alpha_grad" in tensors:
            gradient = torch.autograd.grad(error + penalty, learned[0].v)[0]
            group.compare(gradient, tensors[f"loss.{name}.count{count}.alpha_grad"])
    yield group


def loaded_rounding(tensors: Record, key: str) -> AdaRound:
    """A 4-bit rounding at a golden point."""
    weight = tensors[f"{key}.weight"]
    return at(AdaRound(weight, stored(tensors, key), QuantSpec(4, axis=0)), tensors[f"{key}.alpha"])


def loss_forward(tensors: Record, name: str, layers: dict[str, AdaRound]) -> tuple[Tensor, list[AdaRound]]:
    """Outputs of the golden layer or block, and the roundings that its penalty covers (not the embedding's)."""
    x = tensors["loss.x"]
    h = F.conv2d(x, layers["layer"].weight(), tensors["loss.layer.bias"], padding=1)
    if name == "layer":
        return h, [layers["layer"]]
    embedding = F.linear(tensors["loss.emb"], layers["block.emb"].weight(), tensors["loss.block.emb.bias"])
    h = F.silu(h) + embedding[:, :, None, None]
    out = F.conv2d(F.silu(h), layers["block.conv2"].weight(), tensors["loss.block.conv2.bias"], padding=1) + x
    return out, [layers["layer"], layers["block.conv2"]]


def learn(
    forward: Callable[[], list[Tensor]], targets: list[Tensor], roundings: list[AdaRound], record: Record, b_range: list[float]
) -> list[float]:
    """A reconstruction on full batches as the release runs it; returns the loss of every iteration, then hardens."""
    annealing, iterations = Annealing(record["warmup"], *b_range), record["iters"]
    optimizer = torch.optim.Adam([rounding.v for rounding in roundings], lr=record["lr"])
    losses = []
    for count in range(1, iterations + 1):
        optimizer.zero_grad()
        total = sum(lp_loss(out, want, 2, dim=1) for out, want in zip(forward(), targets, strict=True))
        if annealing.active(count, iterations):
            beta = annealing.beta(count, iterations)
            total = total + record["w"] * sum(rounding_penalty(rounding.h, beta) for rounding in roundings)
        total.backward()
        optimizer.step()
        losses.append(float(total))
    for rounding in roundings:
        rounding.harden()
    return losses


def flips(ours: Tensor, golden: Tensor) -> int:
    """How many weights decided otherwise."""
    return int(((ours >= 0) != (golden >= 0)).sum())


def recon(goldens: Goldens) -> Iterator[Group]:
    """A whole reconstruction of a layer."""
    group, exact = Group("layer reconstruction", LEARNED), Group("layer reconstruction, flips", EXACT)
    tensors, record = goldens.tensors, goldens.meta["loss"]["recon"]
    weight, bias, x = (tensors[f"recon.{name}"] for name in ("weight", "bias", "x"))
    target = F.conv2d(x, weight, bias, padding=1)
    quantizer = weight_quantizer(weight, record["bits"], exact, "recon", tensors)
    group.compare(target, tensors["recon.y_fp"])
    group.compare(F.conv2d(x, quantizer(weight), bias, padding=1), tensors["recon.y_nearest"])
    rounding = quantizer.learn_rounding(weight)
    losses = learn(
        lambda: [F.conv2d(x, quantizer(weight), bias, padding=1)], [target], [rounding], record, record["b_range"]
    )
    for ours, golden in zip(losses, record["loss"], strict=True):
        group.compare(ours, golden)
    group.compare(rounding.v, tensors["recon.alpha_final"])
    exact.compare(float(flips(rounding.v, tensors["recon.alpha_final"])), 0.0)
    group.compare(F.conv2d(x, quantizer(weight), bias, padding=1), tensors["recon.y_final"])
    yield from (group, exact)


def time_embeddings(goldens: Goldens) -> Iterator[Group]:
    """Sinusoids of the timesteps in both conventions."""
    group, t = Group("time embedding", ROUNDING), goldens.tensors["temb.t"]
    for key in list(goldens.tensors):
        prefix, kind, *size = key.split(".")
        if prefix == "temb" and size:
            group.compare(sinusoid(t, int(size[0]), kind), goldens.tensors[key])
    yield group


def sinusoid(t: Tensor, size: int, kind: str) -> Tensor:
    """The time embedding of LDM or DDIM, as our UNets make it."""
    ldm = kind == "ldm"
    return get_timestep_embedding(t, size, flip_sin_to_cos=ldm, downscale_freq_shift=0 if ldm else 1)


def tib(goldens: Goldens) -> Iterator[Group]:
    """The temporal information block: float, rounded to nearest, and reconstructed."""
    group, exact = Group("temporal block", LEARNED), Group("temporal block, scales and flips", EXACT)
    tensors = goldens.tensors
    for kind, record in goldens.meta["tib"].items():
        heads = [f"head{i}" for i in range(len(record["outs"]))]
        names = ["dense0", "dense1", *heads]
        weights, biases = ({n: tensors[f"tib.{kind}.{n}.{part}"] for n in names} for part in ("weight", "bias"))
        quantizers = {n: weight_quantizer(weights[n], 4, exact, f"tib.{kind}.{n}", tensors) for n in names}
        x = sinusoid(tensors["tib.t"], record["ch"], kind)

        def forward(used: list[str], x=x, weights=weights, biases=biases, quantizers=quantizers) -> list[Tensor]:
            effective = {n: quantizers[n](w) if n in used else w for n, w in weights.items()}
            for n in ("dense0", "dense1"):
                x = F.silu(F.linear(x, effective[n], biases[n]))
            return [F.linear(x, effective[n], biases[n]) for n in weights if n.startswith("head")]

        def compare(outs: list[Tensor], name: str, kind: str = kind) -> None:
            for i, out in enumerate(outs):
                group.compare(out, tensors[f"tib.{kind}.{name}.{i}"])

        targets = forward([])
        compare(targets, "fp")
        compare(forward(names), "w4_nearest")
        compare(forward(names[1:]), "w4_nearest_firstfp")
        roundings = {n: quantizers[n].learn_rounding(weights[n]) for n in names}
        learned = [roundings[n] for n in names[1:]]
        losses = learn(lambda f=forward, n=names: f(n[1:]), targets, learned, record, [20, 2])
        for ours, golden in zip(losses, record["loss"], strict=True):
            group.compare(ours, golden)
        for n in names:
            final = tensors[f"tib.{kind}.{n}.alpha_final"]
            group.compare(roundings[n].v, final)
            exact.compare(float(flips(roundings[n].v, final)), 0.0)
        compare(forward(names[1:]), "w4_adaround")
    yield from (group, exact)


def split(goldens: Goldens) -> Iterator[Group]:
    """Q-Diffusion's split of a convolution whose input is a concatenation: each half has its own grids."""
    group, tensors = Group("split convolution", ROUNDING), goldens.tensors
    x, weight, bias = (tensors[f"split.{name}"] for name in ("x", "weight", "bias"))
    group.compare(F.conv2d(x, weight, bias), tensors["split.fp"])
    for record in goldens.meta["split"]:
        key, at_channel = record["key"], record["split"]
        spec = QuantSpec(record["a_bits"])
        halves = [part.split([at_channel, weight.shape[1] - at_channel], dim=1) for part in (x, weight)]
        xs = [place(h, spec, group, f"{key}.{n}", tensors) for h, n in zip(halves[0], ("aqtizer", "aqtizer1"), strict=True)]
        names = [f"{key}.wqtizer", f"{key}.wqtizer1"]
        quantizers = [weight_quantizer(h, record["w_bits"], group, n, tensors) for h, n in zip(halves[1], names, strict=True)]

        def output(x: Tensor, halves=halves, quantizers=quantizers) -> Tensor:
            return F.conv2d(x, torch.cat([q(w) for q, w in zip(quantizers, halves[1], strict=True)], dim=1), bias)

        group.compare(output(torch.cat(xs, dim=1)), tensors[f"{key}.y"])
        group.compare(output(x), tensors[f"{key}.y_weight_only"])
        yield_whole(group, record, x, weight, bias, tensors)
        roundings = [at(q.learn_rounding(w), tensors[f"{n}.alpha"]) for q, w, n in zip(quantizers, halves[1], names, strict=True)]
        soft = output(x)
        group.compare(soft, tensors[f"{key}.y_adaround_soft"])
        meta = goldens.meta["loss"]
        beta = Annealing(meta["warmup"], *meta["b_range"]).beta(100, meta["iters"])
        error = lp_loss(soft, tensors["split.fp"], meta["p"], dim=1)
        penalty = sum(rounding_penalty(r.h, beta) * h.shape[1] / weight.shape[1] for r, h in zip(roundings, halves[1], strict=True))
        group.compare(error, record["block_rec"])
        group.compare(error + meta["w"] * penalty, record["block_loss_count100"])
        for rounding in roundings:
            rounding.harden()
        group.compare(output(x), tensors[f"{key}.y_adaround_hard"])
    yield group

"""Compare our arithmetic with numbers that the original TFMQ-DM program made.

    python scripts/check_goldens.py quantizers DIR

DIR holds `meta.json`, `timestep_maps.json` and the safetensors files that `meta.json` describes;
`tests/goldens/README.md` says what is in them. Shapes, seeds and settings are read from the files, so any set of the
same layout can be checked. Every tensor has to be read by some comparison. Differences are relative to the largest
magnitude of the golden tensor.

Reconstructions run in double precision from the single-precision start: then convolution kernels do not matter, and
what remains is the rounding of the original. A squared error is a small difference of large outputs, which magnifies
their rounding; its relative difference is divided by that magnification. Learned V are compared by root mean square,
because Adam divides gradients by their size and so blows the rounding of a single vanishing gradient up without
bound; their signs must all agree.

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
from torch import Tensor, nn

from tfmq_exp.quant.clock import StepClock
from tfmq_exp.quant.functional import fake_quantize, qparams_from_range
from tfmq_exp.quant.layers import QuantConv2d
from tfmq_exp.quant.quantizers.affine import AffineQuantizer, WeightQuantizer
from tfmq_exp.quant.quantizers.base import Mode
from tfmq_exp.quant.quantizers.split import SplitQuantizer
from tfmq_exp.quant.ranges import Histogram, KLSearch, LpSearch, MinMax, RangeEstimator
from tfmq_exp.quant.rounding import AdaRound, rectified_sigmoid, rounding_penalty
from tfmq_exp.quant.sources.static import Static
from tfmq_exp.quant.spec import QParams, QuantSpec
from tfmq_exp.reconstruction.objectives import Annealing, lp_loss
from tfmq_exp.sampling.sampler import DDIM, finite_set

RELEASED = LpSearch(widen=False)
ESTIMATORS: dict[str, RangeEstimator] = {
    "minmax": MinMax(),
    "mse": RELEASED,
    "kl": KLSearch(),
    "hist": Histogram(positive_only=True),
}
EXACT, ROUNDING = 0.0, 1e-6  # the same bits; the same numbers but for the order of float32 sums
LEARNED = 4e-6  # V after a whole reconstruction
SCHEDULE = {"num_train_timesteps": 1000, "beta_start": 0.0015, "beta_end": 0.0195, "beta_schedule": "scaled_linear"}

Values = Tensor | float | Sequence[float]


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
                json.loads((folder / name).read_text(), object_hook=Record)
                for name in ("meta.json", "timestep_maps.json")
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

    def compare(self, ours: Values, golden: Values, magnified: float = 1.0, norm: float = math.inf) -> None:
        """Add one comparison.

        Args:
            ours: tensor, number or list of numbers.
            golden: the same of the original.
            magnified: how much larger rounding is than usual, where numbers come from a small difference of large ones.
            norm: of the difference and of the golden values: the largest (default) or 2.
        """
        a, b = (x.detach().double() if isinstance(x, Tensor) else torch.tensor(x).double() for x in (ours, golden))
        self.comparisons += 1
        self.values += b.numel()
        if a.numel() != b.numel():
            self.worst = math.inf
            return
        difference = (a.flatten() - b.flatten()).norm(norm)
        relative = float(difference / b.norm(norm)) / magnified if difference else 0.0
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


def on_grid(x: Tensor, spec: QuantSpec) -> Tensor:
    """A tensor on the grid of its own range, as the release finds it."""
    return fake_quantize(x, qparams_from_range(*RELEASED(x, spec), spec), spec)


def place(x: Tensor, spec: QuantSpec, group: Group, key: str, tensors: Record) -> Tensor:
    """`on_grid`, and compare scale and zero point."""
    q = qparams_from_range(*RELEASED(x, spec), spec)
    for ours, golden in zip(q, stored(tensors, key), strict=True):
        group.compare(ours, golden)
    return fake_quantize(x, q, spec)


def input_quantizer(x: Tensor, spec: QuantSpec, group: Group, key: str, tensors: Record) -> AffineQuantizer:
    """A quantizer placed on an activation as the release does, compared with the golden scale and zero point."""
    quantizer = AffineQuantizer(Static(spec))
    for name, ours, golden in zip(
        ("scale", "zero_point"), qparams_from_range(*RELEASED(x, spec), spec), stored(tensors, key), strict=True
    ):
        group.compare(ours, golden)
        getattr(quantizer.source, name).data.copy_(ours.flatten())
    quantizer.mode = Mode.QUANTIZE
    return quantizer


def scalers(goldens: Goldens) -> Iterator[Group]:
    """Range estimators: scale, zero point and quantized tensor of every case, and the cases that crashed."""
    groups = {name: Group(f"scaler {name}", ROUNDING if name in ("kl", "hist") else EXACT) for name in ESTIMATORS}
    crashed = Group("scaler, original crashed", EXACT)
    for case in goldens.meta["cases"]:
        x = goldens.tensors[f"input.{case['input']}"]
        spec = spec_of(case, case["bits"], 0 if case["channel_wise"] else None)
        if case["status"] != "ok":
            estimator = Histogram() if case["scaler"] == "hist" else ESTIMATORS[case["scaler"]]
            error = fake_quantize(x, qparams_from_range(*estimator(x, spec), spec), spec) - x
            crashed.compare(float(error.norm() < x.norm()), 1.0)  # finite, and better than no tensor at all
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
        crashed.note = (
            f"original crashed: {crashed.comparisons} cases, ours finite: {'all' if crashed.ok else 'not all'}"
        )
        yield crashed


def running(goldens: Goldens) -> Iterator[Group]:
    """Running ranges over a sequence of batches, the first of which is seen twice."""
    group = Group("running range", EXACT)
    for record in goldens.meta["running"]:
        x, spec = goldens.tensors[record["x"]], spec_of(record, record["bits"], None)
        key, names = record["key"], ("x_min", "x_max", "delta", "zero_point")
        source = Static(spec, momentum=record["momentum"])
        for row, batch in enumerate((x[0], *x)):
            source.observe(batch)
            ours = {"x_min": source.lo, "x_max": source.hi, "delta": source.scale, "zero_point": source.zero_point}
            if row == 0:  # the release starts from its scaler and replaces that by min-max at the first update
                q = qparams_from_range(*ESTIMATORS[record["init_scaler"]](batch, spec), spec)
                ours |= {"delta": q.scale, "zero_point": q.zero_point}
            for name in names:
                group.compare(ours[name], goldens.tensors[f"{key}.{name}"][row])
        group.compare(fake_quantize(x[-1], source(x[-1]), spec), goldens.tensors[f"{key}.y_last"])
    yield group


def adaround(goldens: Goldens) -> Iterator[Group]:
    """Learned rounding: start, soft and hard weights, and the gradient of V."""
    group, exact = Group("AdaRound, soft and gradient", ROUNDING), Group("AdaRound, hard", EXACT)
    for record in goldens.meta["adaround"]:
        tensors = goldens.tensors
        prefix = f"{record['key']}."
        golden = Record({key.removeprefix(prefix): tensors[key] for key in list(tensors) if key.startswith(prefix)})
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
        assert rounding.v.grad is not None
        group.compare(rounding.v.grad, golden["alpha_grad"])
    v, h = (goldens.tensors[f"adaround.soft_grid.{name}"] for name in ("alpha", "h"))
    group.compare(rectified_sigmoid(v), h)
    yield from (group, exact)


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
        magnified = magnification(error.detach(), tensors[f"loss.{name}.tgt"])
        group.compare(annealing.beta(count, iterations), record["b"])
        group.compare(error, record["rec"], magnified)
        group.compare(penalty, record["round"])
        group.compare(error + penalty, record["total"])
        group.compare(out, tensors[f"loss.{name}.out"])
        if f"loss.{name}.count{count}.alpha_grad" in tensors:
            gradient = torch.autograd.grad(error + penalty, learned[0].v)[0]
            group.compare(gradient, tensors[f"loss.{name}.count{count}.alpha_grad"], magnified)
    yield group


def magnification(loss: Tensor | float, *targets: Tensor) -> float:
    """How many times larger the outputs are than their error: rounding of outputs grows by this in a squared error."""
    power = sum(float(lp_loss(target, torch.zeros_like(target), 2)) for target in targets)
    return max(1.0, math.sqrt(power / float(loss)))


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
    forward: Callable[[], list[Tensor]],
    targets: list[Tensor],
    roundings: list[AdaRound],
    record: Record,
    b_range: list[float],
) -> list[float]:
    """A reconstruction on full batches as the release runs it; returns the loss of every iteration, then hardens."""
    annealing, iterations = Annealing(record["warmup"], *b_range), record["iters"]
    optimizer = torch.optim.Adam([rounding.v for rounding in roundings], lr=record["lr"])
    losses = []
    for count in range(1, iterations + 1):
        optimizer.zero_grad()
        errors = [lp_loss(out, want, 2, dim=1) for out, want in zip(forward(), targets, strict=True)]
        total = torch.stack(errors).sum()
        if annealing.active(count, iterations):
            beta = annealing.beta(count, iterations)
            total = total + record["w"] * sum(rounding_penalty(rounding.h, beta) for rounding in roundings)
        total.backward()
        optimizer.step()
        losses.append(total.item())
    for rounding in roundings:
        rounding.harden()
    return losses


def flips(ours: Tensor, golden: Tensor) -> int:
    """How many weights decided otherwise."""
    return int(((ours >= 0) != (golden >= 0)).sum())


def compare_learned(
    groups: tuple[Group, Group, Group],
    losses: list[float],
    golden_losses: list[float],
    targets: list[Tensor],
    pairs: list[tuple[AdaRound, Tensor]],
) -> None:
    """The loss of every iteration, every learned V, and the decisions."""
    group, learned, exact = groups
    for ours, golden in zip(losses, golden_losses, strict=True):
        group.compare(ours, golden, magnification(golden, *targets))
    worst = max(abs(ours / golden - 1) for ours, golden in zip(losses, golden_losses, strict=True))
    group.note += f"{', ' if group.note else 'losses, not divided: '}{worst:.1e}"
    for rounding, golden in pairs:
        learned.compare(rounding.v, golden, norm=2)
        exact.compare(float(((rounding.v >= 0) != (golden >= 0)).sum()), 0.0)


def learned_groups(what: str) -> tuple[Group, Group, Group]:
    """Where the comparisons of a reconstruction go."""
    names = (f"{what}: losses, outputs", f"{what}: learned V", f"{what}: grids, decisions")
    return tuple(map(Group, names, (ROUNDING, LEARNED, EXACT)))  # type: ignore[return-value]


def recon(goldens: Goldens) -> Iterator[Group]:
    """A whole reconstruction of a layer."""
    group, _, exact = groups = learned_groups("layer reconstruction")
    tensors, record = goldens.tensors, goldens.meta["loss"]["recon"]
    weight, bias, x = (tensors[f"recon.{name}"] for name in ("weight", "bias", "x"))

    def output(weight: Tensor) -> Tensor:
        return F.conv2d(x.to(weight), weight, bias.to(weight), padding=1)

    quantizer = weight_quantizer(weight, record["bits"], exact, "recon", tensors)
    group.compare(output(weight), tensors["recon.y_fp"])
    group.compare(output(quantizer(weight)), tensors["recon.y_nearest"])
    rounding = quantizer.learn_rounding(weight).double()
    targets = [output(weight.double())]
    losses = learn(lambda: [output(quantizer(weight))], targets, [rounding], record, record["b_range"])
    compare_learned(groups, losses, record["loss"], targets, [(rounding, tensors["recon.alpha_final"])])
    group.compare(output(quantizer(weight)), tensors["recon.y_final"])
    yield from groups


def time_embeddings(goldens: Goldens) -> Iterator[Group]:
    """Sinusoids of the timesteps in both conventions, as our UNets make them."""
    t = goldens.tensors["temb.t"]
    angle = float(t.max()) * torch.finfo(torch.float32).eps  # rounding of the largest argument of the sine
    group, same = Group("time embedding", angle), Group("time embedding, release's order", ROUNDING)
    for key in list(goldens.tensors):
        prefix, kind, *size = key.split(".")
        if prefix == "temb" and size:
            ldm = kind == "ldm"
            ours = get_timestep_embedding(t, int(size[0]), flip_sin_to_cos=ldm, downscale_freq_shift=0 if ldm else 1)
            group.compare(ours, goldens.tensors[key])
            same.compare(released_sinusoid(t, int(size[0]), kind), goldens.tensors[key])
    yield from (group, same)


def released_sinusoid(t: Tensor, size: int, kind: str) -> Tensor:
    """The time embedding to the last bit: the input of the golden temporal blocks, which the goldens do not hold."""
    half, steps = size // 2, torch.arange(size // 2, dtype=torch.float32)
    if kind == "ldm":
        angle = t[:, None].float() * torch.exp(-math.log(10000) * steps / half)
        return F.pad(torch.cat([angle.cos(), angle.sin()], dim=1), (0, size % 2))
    angle = t[:, None].float() * torch.exp(steps * -(math.log(10000) / (half - 1)))
    return F.pad(torch.cat([angle.sin(), angle.cos()], dim=1), (0, size % 2))


def tib(goldens: Goldens) -> Iterator[Group]:
    """The temporal information block: float, rounded to nearest, and reconstructed."""
    groups = learned_groups("temporal block")
    for kind, record in goldens.meta["tib"].items():
        temporal_block(goldens, kind, record, groups)
    yield from groups


def temporal_block(goldens: Goldens, kind: str, record: Record, groups: tuple[Group, Group, Group]) -> None:
    """One temporal block. Its first linear layer stays float while the others are learned."""
    tensors, key = goldens.tensors, f"tib.{kind}"
    group, _, exact = groups
    t = released_sinusoid(tensors["tib.t"], record["ch"], kind)
    names = ["dense0", "dense1", *(f"head{i}" for i in range(len(record["outs"])))]
    weights, biases = ({n: tensors[f"{key}.{n}.{part}"] for n in names} for part in ("weight", "bias"))
    quantizers = {n: weight_quantizer(weights[n], 4, exact, f"{key}.{n}", tensors) for n in names}

    def forward(quantized: list[str], dtype: torch.dtype = torch.float32) -> list[Tensor]:
        def linear(x: Tensor, n: str) -> Tensor:
            weight = quantizers[n](weights[n]) if n in quantized else weights[n]
            return F.linear(x, weight.to(dtype), biases[n].to(dtype))

        hidden = F.silu(linear(F.silu(linear(t.to(dtype), "dense0")), "dense1"))
        return [linear(hidden, n) for n in names[2:]]

    def compare(outputs: list[Tensor], name: str) -> None:
        for i, output in enumerate(outputs):
            group.compare(output, tensors[f"{key}.{name}.{i}"])

    compare(forward([]), "fp")
    compare(forward(names), "w4_nearest")
    compare(forward(names[1:]), "w4_nearest_firstfp")
    roundings = {n: quantizers[n].learn_rounding(weights[n]).double() for n in names}
    targets, learning = forward([], torch.float64), [roundings[n] for n in names[1:]]
    losses = learn(lambda: forward(names[1:], torch.float64), targets, learning, record, [20, 2])
    pairs = [(roundings[n], tensors[f"{key}.{n}.alpha_final"]) for n in names]
    compare_learned(groups, losses, record["loss"], targets, pairs)
    compare(forward(names[1:]), "w4_adaround")


def split(goldens: Goldens) -> Iterator[Group]:
    """Q-Diffusion's split of a convolution whose input is a concatenation: each half has its own grids."""
    group, exact = Group("split convolution", ROUNDING), Group("split convolution, grids", EXACT)
    x, weight, bias = (goldens.tensors[f"split.{name}"] for name in ("x", "weight", "bias"))
    group.compare(F.conv2d(x, weight, bias), goldens.tensors["split.fp"])
    for record in goldens.meta["split"]:
        split_case(goldens, record, group, exact)
    yield from (group, exact)


def split_case(goldens: Goldens, record: Record, group: Group, exact: Group) -> None:
    """One pair of bit widths: nearest rounding with and without the split, then AdaRound of both halves."""
    tensors, key, meta = goldens.tensors, record["key"], goldens.meta["loss"]
    x, weight, bias, target = (tensors[f"split.{name}"] for name in ("x", "weight", "bias", "fp"))
    sizes = [record["split"], weight.shape[1] - record["split"]]
    names, inputs = [f"{key}.wqtizer", f"{key}.wqtizer1"], [f"{key}.aqtizer", f"{key}.aqtizer1"]
    input_spec, weight_spec = QuantSpec(record["a_bits"]), QuantSpec(record["w_bits"], axis=0)
    layer = QuantConv2d.from_float(nn.Conv2d(weight.shape[1], weight.shape[0], weight.shape[2:]).requires_grad_(False))
    layer.weight, layer.bias = nn.Parameter(weight, requires_grad=False), nn.Parameter(bias, requires_grad=False)
    halves = zip(weight.split(sizes, dim=1), names, strict=True)
    layer.weight_quantizer = SplitQuantizer(
        [weight_quantizer(w, record["w_bits"], exact, name, tensors) for w, name in halves], sizes
    )
    pieces = zip(x.split(sizes, dim=1), inputs, strict=True)
    layer.input_quantizer = SplitQuantizer(
        [input_quantizer(piece, input_spec, exact, name, tensors) for piece, name in pieces], sizes
    )
    group.compare(layer(x), tensors[f"{key}.y"])
    layer.input_quantizer = nn.Identity()
    group.compare(layer(x), tensors[f"{key}.y_weight_only"])
    group.compare(F.conv2d(on_grid(x, input_spec), on_grid(weight, weight_spec), bias), tensors[f"{key}.y_nosplit"])

    roundings = [quantizer.learn_rounding(part) for quantizer, part in layer.weight_parts()]
    for rounding, name in zip(roundings, names, strict=True):
        at(rounding, tensors[f"{name}.alpha"])
    soft = layer(x)
    beta = Annealing(meta["warmup"], *meta["b_range"]).beta(100, meta["iters"])
    shares = [size / weight.shape[1] for size in sizes]
    penalty = sum(share * rounding_penalty(r.h, beta) for share, r in zip(shares, roundings, strict=True))
    error = lp_loss(soft, target, meta["p"], dim=1)
    group.compare(soft, tensors[f"{key}.y_adaround_soft"])
    group.compare(error, record["block_rec"], magnification(error.detach(), target))
    group.compare(error + meta["w"] * penalty, record["block_loss_count100"])
    for rounding in roundings:
        rounding.harden()
    group.compare(layer(x), tensors[f"{key}.y_adaround_hard"])


def attention(goldens: Goldens) -> Iterator[Group]:
    """Both matrix products of attention on quantized operands; the softmax has a grid that starts at zero."""
    group, exact = Group("attention operands", ROUNDING), Group("attention operands, grids", EXACT)
    tensors = goldens.tensors
    for record in goldens.meta["attn"]:
        key, spec = record["key"], QuantSpec(8)
        scales = {"q": record["scale"], "k": record["scale"], "v": 1.0}
        q, k, v = (place(tensors[f"attn.{n}"] * s, spec, exact, f"{key}.{n}", tensors) for n, s in scales.items())
        product = torch.einsum("bct,bcs->bts", q, k)
        softmax = product.softmax(dim=-1)
        weights = place(softmax, QuantSpec(record["softmax_bits"], "unsigned"), exact, f"{key}.w", tensors)
        group.compare(product, tensors[f"{key}.qk"])
        group.compare(torch.einsum("bts,bcs->bct", weights, v), tensors[f"{key}.out"])
    yield from (group, exact)


def timesteps(goldens: Goldens) -> Iterator[Group]:
    """The sampler's timesteps, and the step that each of them reads its scales from."""
    group, mislabelled = Group("timesteps", EXACT), Group("timesteps, mislabelled in the original", EXACT)
    for record in goldens.timesteps["ldm_uniform"].values():
        ours = finite_set(DDIM(record["requested"]), SCHEDULE)
        group.compare(ours, record["sampler_timesteps"])
        if record["labels_match"]:
            group.compare(ours, record["calibration_labels"])
            group.compare(StepClock(ours).steps_of(torch.tensor(ours)), record["act_index_at_inference"])
        else:
            mislabelled.compare(float(len(ours)), float(record["sampler_steps"]))
    for record in goldens.timesteps["ddim_quad"].values():
        original = DDIM(len(record["seq_ascending"]), spacing="quadratic", offset=0)
        group.compare(original.calls(SCHEDULE), record["seq_ascending"][::-1])
        group.compare(float(len(finite_set(original, SCHEDULE))), float(record["distinct"]))
    yield group
    if mislabelled.comparisons:
        mislabelled.note = "another number of steps than asked for: its labels and tables are not those of its steps"
        yield mislabelled


QUANTIZERS = (
    scalers, running, adaround, temperature, loss, recon, time_embeddings, tib, split, attention, timesteps
)  # fmt: skip


def check_quantizers(folder: Path) -> list[Group]:
    """Every comparison of a folder of the `quantizers` layout, and whether every tensor took part."""
    goldens = Goldens.load(folder)
    groups = [group for check in QUANTIZERS for group in check(goldens)]
    coverage = Group("tensors read", EXACT)
    unread = sorted(set(goldens.tensors) - goldens.tensors.read)
    coverage.compare(len(goldens.tensors) - len(unread), len(goldens.tensors))
    coverage.note = f"not read: {', '.join(unread[:3])}" if unread else ""
    return [*groups, coverage]


def print_groups(groups: list[Group]) -> None:
    """One line per group."""
    table = Table(title="differences from the original program", title_justify="left")
    for column in ("group", "comparisons", "values", "worst", "tolerance", "", "note"):
        table.add_column(column, justify="left" if column in ("group", "", "note") else "right")
    for g in groups:
        numbers = (str(g.comparisons), str(g.values), f"{g.worst:.1e}", f"{g.tolerance:.1e}")
        table.add_row(g.name, *numbers, "ok" if g.ok else "FAILED", g.note)
    Console().print(table)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one kind of check on a folder; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    kinds = parser.add_subparsers(dest="kind", required=True)
    quantizers = kinds.add_parser("quantizers", help="ranges, rounding, losses, reconstructions, timesteps")
    quantizers.add_argument("folder", type=Path)
    quantizers.set_defaults(check=check_quantizers)
    options = parser.parse_args(arguments)
    try:
        groups = options.check(options.folder)
    except DamagedError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    print_groups(groups)
    return int(not all(group.ok for group in groups))


if __name__ == "__main__":
    sys.exit(main())

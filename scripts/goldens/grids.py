"""Ranges, split convolutions, attention and timesteps against the release's."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import nn

from goldens.comparing import EXACT, ROUNDING, Group, Record
from goldens.objective import magnification, rounding_penalty
from goldens.released import ESTIMATORS, Goldens, at, input_quantizer, on_grid, place, spec_of, weight_quantizer
from tfmq_exp.quant.functional import fake_quantize, qparams_from_range
from tfmq_exp.quant.histogram_observers import HistogramPercentileObserver
from tfmq_exp.quant.layers import QuantConv2d
from tfmq_exp.quant.quantizers import SplitQuantizer
from tfmq_exp.quant.scales.observed_ranges import EMARange, StaticConfig
from tfmq_exp.quant.spec import QuantSpec
from tfmq_exp.quant.timestep_context import TimestepContext
from tfmq_exp.reconstruction.objectives import Annealing, Lp
from tfmq_exp.sampling.samplers import DDIM
from tfmq_exp.sampling.trajectory import finite_set

SCHEDULE = {"num_train_timesteps": 1000, "beta_start": 0.0015, "beta_end": 0.0195, "beta_schedule": "scaled_linear"}


def scalers(goldens: Goldens) -> Iterator[Group]:
    """Observers: scale, zero point and quantized tensor of every case, and the cases that crashed."""
    groups = {name: Group(f"scaler {name}", ROUNDING if name in ("kl", "hist") else EXACT) for name in ESTIMATORS}
    crashed = Group("scaler, original crashed", EXACT)
    for case in goldens.meta["cases"]:
        x = goldens.tensors[f"input.{case['input']}"]
        spec = spec_of(case, case["bits"], 0 if case["channel_wise"] else None)
        if case["status"] != "ok":
            observer = HistogramPercentileObserver() if case["scaler"] == "hist" else ESTIMATORS[case["scaler"]]
            error = fake_quantize(x, qparams_from_range(*observer(x, spec), spec), spec) - x
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
        source = EMARange(StaticConfig(momentum=record["momentum"]), spec)
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
    error = Lp(meta["p"]).loss(soft, target, None)[0]
    group.compare(soft, tensors[f"{key}.y_adaround_soft"])
    group.compare(error, record["block_rec"], magnification(error, target))
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
            group.compare(TimestepContext(ours).step_indices(torch.tensor(ours)), record["act_index_at_inference"])
        else:
            mislabelled.compare(float(len(ours)), float(record["sampler_steps"]))
    for record in goldens.timesteps["ddim_quad"].values():
        original = DDIM(len(record["seq_ascending"]), timestep_spacing="quadratic", steps_offset=0)
        group.compare(original.calls(SCHEDULE), record["seq_ascending"][::-1])
        group.compare(float(len(finite_set(original, SCHEDULE))), float(record["distinct"]))
    yield group
    if mislabelled.comparisons:
        mislabelled.note = "another number of steps than asked for: its labels and tables are not those of its steps"
        yield mislabelled

"""Learned rounding, losses and whole reconstructions against the release's.

Reconstructions run in double precision from the single-precision start: then convolution kernels do not matter, and
what remains is the rounding of the original. A squared error is a small difference of large outputs, which magnifies
their rounding; its relative difference is divided by that magnification. Learned V are compared by root mean square,
because Adam divides gradients by their size and so blows the rounding of a single vanishing gradient up without
bound; their signs must all agree.
"""

import math
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from diffusers.models.embeddings import get_timestep_embedding
from torch import Tensor

from goldens.comparing import EXACT, ROUNDING, Group, Record
from goldens.objective import magnification, rounding_penalty
from goldens.released import ESTIMATORS, Goldens, at, spec_of, stored, weight_quantizer
from tfmq_exp.core.distributed import concatenated
from tfmq_exp.quant.functional import fake_quantize, qparams_from_range
from tfmq_exp.quant.rounding import AdaRound, JointRounding, penalty_gradient, rectified_sigmoid
from tfmq_exp.quant.spec import QuantSpec
from tfmq_exp.reconstruction.objectives import Annealing, Lp

LEARNED = 4e-6  # V after a whole reconstruction


def adaround(goldens: Goldens) -> Iterator[Group]:
    """Learned rounding: start, soft and hard weights, and the gradient of V."""
    group, exact = Group("AdaRound, soft and gradient", ROUNDING), Group("AdaRound, hard", EXACT)
    tensors = goldens.tensors
    for record in goldens.meta["adaround"]:
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
        joint = JointRounding([rounding])
        group.compare(rounding.weight(), golden["soft_out_pert"])
        group.compare(joint.gradient(golden["grad_out"].flatten()).view_as(weight), golden["alpha_grad"])
    group.compare(rectified_sigmoid(tensors["adaround.soft_grid.alpha"]), tensors["adaround.soft_grid.h"])
    yield from (group, exact)


def temperature(goldens: Goldens) -> Iterator[Group]:
    """The penalty's exponent and when it counts."""
    group = Group("annealing", EXACT)
    for record in goldens.meta["temperature"]:
        annealing, iterations = Annealing(record["warmup"], *record["b_range"]), record["iters"]
        group.compare([annealing.beta(count, iterations) for count in record["counts"]], record["b"])
        active = [float(annealing.active(count, iterations)) for count in record["counts"]]
        group.compare(active, list(map(float, record["round_loss_active"])))
    yield group


def loss(goldens: Goldens) -> Iterator[Group]:
    """Output error and rounding penalty of a layer and of a block, and the gradient of V."""
    group, tensors, meta = Group("loss", ROUNDING), goldens.tensors, goldens.meta["loss"]
    for record in meta["lp"]:
        prediction, target = (tensors[f"{record['tensor']}.{name}"] for name in ("pred", "tgt"))
        mean = Lp(record["p"]).loss(prediction, target, None)[0] / target.shape[2 if target.dim() == 3 else 1]
        group.compare(mean * target.shape[1], record["none_reduction"])  # the sum is over dimension 1, of tokens too
        group.compare(mean, record["all_reduction"])
    layers = {name: loaded_rounding(tensors, f"loss.{name}") for name in ("layer", "block.conv2", "block.emb")}
    annealing, iterations = Annealing(meta["warmup"], *meta["b_range"]), meta["iters"]
    for record in meta["values"]:
        name, count = record["object"], record["count"]
        learned = [layers["layer"], *([] if name == "layer" else [layers["block.conv2"]])]
        joint = JointRounding(learned)  # without the embedding's
        out = loss_forward(tensors, name, layers)
        error, slope = Lp(meta["p"]).loss(out, tensors[f"loss.{name}.tgt"], None)
        penalty, to_h = torch.zeros(()), torch.zeros_like(joint.h)
        if annealing.active(count, iterations):
            beta = annealing.beta(count, iterations)
            penalty, to_h = meta["w"] * rounding_penalty(joint.h, beta), meta["w"] * penalty_gradient(joint.h, beta)
        magnified = magnification(error, tensors[f"loss.{name}.tgt"])
        group.compare(annealing.beta(count, iterations), record["b"])
        group.compare(error, record["rec"], magnified)
        group.compare(penalty, record["round"])
        group.compare(error + penalty, record["total"])
        group.compare(out, tensors[f"loss.{name}.out"])
        if (key := f"loss.{name}.count{count}.alpha_grad") in tensors:
            gradient = joint.gradient(concatenated(torch.autograd.grad(out, joint.weights, slope)), to_h)
            group.compare(gradient[: tensors[key].numel()].view_as(tensors[key]), tensors[key], magnified)
    yield group


def loaded_rounding(tensors: Record, key: str) -> AdaRound:
    """A 4-bit rounding at a golden point."""
    weight = tensors[f"{key}.weight"]
    return at(AdaRound(weight, stored(tensors, key), QuantSpec(4, axis=0)), tensors[f"{key}.alpha"])


def loss_forward(tensors: Record, name: str, layers: dict[str, AdaRound]) -> Tensor:
    """Outputs of the golden layer or block."""
    x = tensors["loss.x"]
    h = F.conv2d(x, layers["layer"].weight(), tensors["loss.layer.bias"], padding=1)
    if name == "layer":
        return h
    embedding = F.linear(tensors["loss.emb"], layers["block.emb"].weight(), tensors["loss.block.emb.bias"])
    h = F.silu(h) + embedding[:, :, None, None]
    h = F.conv2d(F.silu(h), layers["block.conv2"].weight(), tensors["loss.block.conv2.bias"], padding=1)
    return h + x


def learn(
    forward: Callable[[], list[Tensor]],
    targets: list[Tensor],
    roundings: list[AdaRound],
    record: Record,
    b_range: list[float],
) -> list[float]:
    """A reconstruction on full batches as the release runs it; returns the loss of every iteration, then hardens."""
    annealing, iterations = Annealing(record["warmup"], *b_range), record["iters"]
    joint, losses = JointRounding(roundings), list[float]()
    optimizer = torch.optim.Adam([joint.v], lr=record["lr"])
    for count in range(1, iterations + 1):
        outputs, to_h = forward(), None
        errors, slopes = zip(*(Lp(2).loss(*both, None) for both in zip(outputs, targets, strict=True)), strict=True)
        losses.append(float(torch.stack(errors).sum()))
        if annealing.active(count, iterations):
            beta = annealing.beta(count, iterations)
            losses[-1] += record["w"] * float(rounding_penalty(joint.h, beta))
            to_h = record["w"] * penalty_gradient(joint.h, beta)
        joint.v.grad = joint.gradient(concatenated(torch.autograd.grad(outputs, joint.weights, slopes)), to_h)
        optimizer.step()
        joint.update()
    for rounding in roundings:
        rounding.harden()
    return losses


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
    """Comparisons of a reconstruction."""
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
    rounding, targets = quantizer.learn_rounding(weight).double(), [output(weight.double())]
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

"""PTQ4DiT's balance, grids and quantized network against the original program's numbers."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from math import log
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from goldens.comparing import EXACT, Group, Record
from tfmq_exp.quant.functional import fake_quantize
from tfmq_exp.quant.grids.released import ReleasedGrid
from tfmq_exp.quant.grids.search import least_error, percentile_ranges
from tfmq_exp.quant.spec import QParams, QuantSpec
from tfmq_exp.quant.transforms.channel_balance import balance, channel_maxima, row_maxima
from tfmq_exp.quant.transforms.salience import salience

BALANCE, FULL_PRECISION, RELATIVE_ERROR = 1e-5, 1e-5, 0.05
ACTIVATIONS, OUTPUT = 2e-3, 2e-3  # relative; standard deviations of the output
EPSILON, NORM_EPSILON, FREQUENCIES = 1e-8, 1e-6, 256
GRID = ReleasedGrid()
# a distance of 255 scales that is off by ACTIVATIONS is off by half a scale, and rounds to the next zero point at most
ZERO_POINT = 1.0

# of weights alone, then of weights and activations: the first call places the grids of activations
OUTPUTS = {"out_weights": False, "out_weights_activations_first_call": True, "out": True}

Layer = Callable[[str, Tensor], Tensor]  # of a module's name and its input


class Call(NamedTuple):
    """Inputs of the network, and the scale of guidance."""

    x: Tensor
    t: Tensor
    y: Tensor
    guidance: float


def place(rows: Tensor, bits: int, *, from_zero: bool = False) -> QParams:
    """Grids of rows, by the search of percentiles."""
    spec = QuantSpec(bits)
    return least_error(rows, (GRID(*ends, spec) for ends in percentile_ranges(rows, from_zero=from_zero)), spec)


@dataclass(frozen=True)
class Network:
    """The original program's DiT as a formula, whose layers and operands of attention are given.

    Args:
        settings: arguments of its constructor.
        parameters: by the original names.
    """

    settings: Record
    parameters: Record

    def layer(self, name: str, x: Tensor, weight: Tensor) -> Tensor:
        """A linear layer, or the convolution of patches, with another weight."""
        bias = self.parameters[f"{name}.bias"]
        return F.linear(x, weight, bias) if weight.dim() == 2 else F.conv2d(x, weight, bias, stride=weight.shape[-1])

    def guided(self, call: Call, layer: Layer, operand: Layer) -> Tensor:
        """Guidance on three channels; the second half of the batch, of the null class, gets the first half's x."""
        half = call.x[: len(call.x) // 2]
        out = self(torch.cat([half, half]), call.t, call.y, layer, operand)
        conditional, unconditional = out[:, :3].chunk(2)
        eps = unconditional + call.guidance * (conditional - unconditional)
        return torch.cat([torch.cat([eps, eps]), out[:, 3:]], dim=1)

    def __call__(self, x: Tensor, t: Tensor, y: Tensor, layer: Layer, operand: Layer) -> Tensor:
        frequencies = torch.exp(-log(10000) * torch.arange(FREQUENCIES // 2, dtype=torch.float32) * 2 / FREQUENCIES)
        angles = t[:, None].float() * frequencies
        sinusoid = torch.cat([angles.cos(), angles.sin()], dim=1)
        embedding = layer("t_embedder.mlp.2", F.silu(layer("t_embedder.mlp.0", sinusoid)))
        c = F.silu(embedding + self.parameters["y_embedder.embedding_table.weight"][y])
        tokens = layer("x_embedder.proj", x).flatten(2).transpose(1, 2) + self.parameters["pos_embed"]
        for i in range(self.settings["depth"]):
            b = f"blocks.{i}"
            shift, scale, gate, *mlp = layer(f"{b}.adaLN_modulation.1", c)[:, None].chunk(6, dim=2)
            tokens = tokens + gate * self.attention(f"{b}.attn", normed(tokens, shift, scale), layer, operand)
            hidden = F.gelu(layer(f"{b}.mlp.fc1", normed(tokens, *mlp[:2])), approximate="tanh")
            tokens = tokens + mlp[2] * layer(f"{b}.mlp.fc2", hidden)
        shift, scale = layer("final_layer.adaLN_modulation.1", c)[:, None].chunk(2, dim=2)
        return self.image(layer("final_layer.linear", normed(tokens, shift, scale)))

    def attention(self, name: str, x: Tensor, layer: Layer, operand: Layer) -> Tensor:
        """Self-attention, with queries scaled before they are an operand."""
        heads = self.settings["num_heads"]
        q, k, v = layer(f"{name}.qkv", x).unflatten(2, (3, heads, -1)).permute(2, 0, 3, 1, 4)
        q, k = operand(f"{name}.q", q * q.shape[-1] ** -0.5), operand(f"{name}.k", k)
        weights = operand(f"{name}.w", (q @ k.transpose(2, 3)).softmax(dim=3))
        out = weights @ operand(f"{name}.v", v)
        return layer(f"{name}.proj", out.transpose(1, 2).flatten(2))

    def image(self, tokens: Tensor) -> Tensor:
        """Patches put together."""
        side, patch = round(tokens.shape[1] ** 0.5), self.settings["patch_size"]
        patches = tokens.unflatten(2, (patch, patch, -1)).unflatten(1, (side, side))
        return patches.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)


def normed(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Modulated layer norm."""
    return F.layer_norm(x, x.shape[-1:], eps=NORM_EPSILON) * (1 + scale) + shift


def untouched(_name: str, x: Tensor) -> Tensor:
    """An operand in full precision."""
    return x


@dataclass
class Activations:
    """Activation quantizers that are placed at their first input.

    Args:
        bits: of activations.
        softmax_bits: of attention weights.
    """

    bits: int
    softmax_bits: int
    placed: dict[str, QParams] = field(default_factory=dict)

    def __call__(self, name: str, x: Tensor) -> Tensor:
        softmax = name.endswith("attn.w")
        bits = self.softmax_bits if softmax else self.bits
        if name not in self.placed:
            q = place(x.reshape(1, -1), bits, from_zero=softmax)
            self.placed[name] = QParams(*(part.reshape(()) for part in q))
        return fake_quantize(x, self.placed[name], QuantSpec(bits))


def check_ptq4dit(settings: Record, recorded: Record) -> Iterator[Group]:
    """Balance, then for every setting the grids of weights and activations, and outputs."""
    parameters = Record({k.removeprefix("float."): recorded[k] for k in recorded if k.startswith("float.")})
    network = Network(settings["constructor"], parameters)
    call = Call(recorded["x"], recorded["t"], recorded["y"], settings["cfg_scale"])
    yield from balances(network, call, recorded)
    for prefix, case in settings["cases"].items():
        yield from quantized(network, call, recorded, prefix, case)


def balances(network: Network, call: Call, recorded: Record) -> Iterator[Group]:
    """The pass in full precision that balances the channels."""
    factors, inputs = Group("ptq4dit: balance", BALANCE), Group("ptq4dit: balanced inputs and weights", BALANCE)

    def plain(name: str, x: Tensor) -> Tensor:
        return network.layer(name, x, network.parameters[f"{name}.weight"])

    def balanced(name: str, x: Tensor) -> Tensor:
        if f"balance.{name}" not in recorded:
            return plain(name, x)
        weight = network.parameters[f"{name}.weight"]
        maxima = channel_maxima(weight)
        b = balance(salience(row_maxima(x), maxima), maxima, 0.5, 0.5, EPSILON)
        golden = recorded[f"balance.{name}"]
        factors.compare(b / golden, torch.ones_like(golden))
        inputs.compare(weight * b, recorded[f"reparam.{name}.weight"])
        if f"balanced_input.{name}" in recorded:
            inputs.compare(x / b, recorded[f"balanced_input.{name}"])
        return network.layer(name, x / b, weight * b)

    for kind, layer in (("out_float", plain), ("out_float_after_balancing", balanced)):
        group = Group(f"ptq4dit: {kind}", FULL_PRECISION)
        group.compare(network.guided(call, layer, untouched), recorded[kind])
        yield group
    yield from (factors, inputs)


def quantized(network: Network, call: Call, recorded: Record, prefix: str, case: Record) -> Iterator[Group]:
    """One setting: grids of balanced weights, then of activations in their order, then outputs.

    Args:
        network: in full precision.
        call: its inputs.
        recorded: tensors of the original.
        prefix: of the setting's names.
        case: bits.
    """
    label = f"ptq4dit {prefix.rstrip('.')}:"
    grids = Group(f"{label} weight grids", EXACT)
    weights: dict[str, Tensor] = {}
    for key in [key for key in recorded if key.startswith(prefix) and key.endswith(".weight.delta")]:
        name = key.removeprefix(prefix).removesuffix(".weight.delta")
        original = network.parameters[f"{name}.weight"]
        weight: Tensor = recorded.get(f"reparam.{name}.weight", original)
        q = place(weight.flatten(1), case["weight_bits"])
        weights[name] = fake_quantize(weight.flatten(1), q, QuantSpec(case["weight_bits"])).reshape(weight.shape)
        grids.compare(q.scale, recorded[f"{prefix}{name}.weight.delta"])
        grids.compare(q.zero_point, recorded[f"{prefix}{name}.weight.zero"])
        if f"{prefix}{name}.weight.dequant" in recorded:
            grids.compare(weights[name], recorded[f"{prefix}{name}.weight.dequant"])
    yield grids

    def layers(quantize: Layer) -> Layer:
        def layer(name: str, x: Tensor) -> Tensor:
            balanced = x / recorded[f"balance.{name}"] if f"balance.{name}" in recorded else x
            return network.layer(name, quantize(f"{name}.act", balanced), weights[name])

        return layer

    activations = Activations(case["act_bits"], case["softmax_bits"])
    outputs = Group(f"{label} outputs", OUTPUT, absolute=True)
    worse = Group(f"{label} relative errors", RELATIVE_ERROR)
    full = recorded["out_float"]
    for kind, quantize in OUTPUTS.items():
        operand = activations if quantize else untouched
        if kind == "out" or f"{prefix}{kind}" in recorded:
            ours, golden = network.guided(call, layers(operand), operand), recorded[f"{prefix}{kind}"]
            outputs.compare(ours / full.std(), golden / full.std())
            worse.compare(float((ours - full).norm()), float((golden - full).norm()))
    scales = Group(f"{label} activation scales", ACTIVATIONS)
    zeros = Group(f"{label} activation zero points", ZERO_POINT, absolute=True)
    for name, q in activations.placed.items():
        scales.compare(q.scale, recorded[f"{prefix}{name}.delta"])
        zeros.compare(q.zero_point, recorded[f"{prefix}{name}.zero"])
    yield from (scales, zeros, outputs, worse)

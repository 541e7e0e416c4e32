"""Activation quantizers as OpenVINO operations around a FakeQuantize with constant range.

The CPU plugin computes in bytes after a FakeQuantize with 256 levels and constant ends. What changes with the sampling step or
with the tensor is therefore applied before and after it:

    v = FakeQuantize(prune((x - offset) / scale) + zero_point - median_zero_point)
    x ~ output_scale * (v - (zero_point - median_zero_point)) + offset
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import openvino.opset13 as ops
import torch
from torch import Tensor, nn

from tfmq_exp.deploy.activation_tables import ActivationScale, RuntimeScale, varies
from tfmq_exp.quant.functional import SMALLEST_SCALE
from tfmq_exp.quant.scales.dynamic import STATISTICS, DynamicGeneratorScale, DynamicScale
from tfmq_exp.quant.scales.generator import softplus_inverse

Node = Any  # openvino's nodes and outputs


class Quantized(NamedTuple):
    """Input minus its offset, as scale * (values - shift); None is a scale of 1 and a shift of 0."""

    values: Node
    scale: Node | None = None
    shift: Node | None = None


def constant(value: Tensor | float) -> Node:
    return ops.constant(torch.as_tensor(value, dtype=torch.float32).detach().cpu().numpy())


def integers(*values: int) -> Node:
    """Make a constant vector of axes, sizes or indices."""
    return ops.constant(np.array(values, np.int64))


def rank_of(x: Node) -> int:
    return x.get_partial_shape().rank.get_length()


def step_columns(scale: ActivationScale | None) -> dict[str, Tensor]:
    """Parameters that change with the sampling step, each [steps]; the graph looks them up."""
    if isinstance(scale, RuntimeScale):
        reads_time = isinstance(scale.source, DynamicGeneratorScale) and scale.source.encoding is not None
        return {"step": torch.arange(scale.source.context.num_steps)} if reads_time else {}  # type: ignore[union-attr]
    if scale is None or scale.static:
        return {}
    middle = scale.median_zero_point
    columns = {"shift": scale.zero_point - middle, "lowest": scale.lowest - middle, "highest": scale.highest - middle}
    columns |= {"offset": scale.offset, "dead_zone": scale.dead_zone, "kept": 1 - scale.pruned}
    varying = {name: column for name, column in columns.items() if varies(column)}
    own = {} if torch.equal(scale.output_scale, scale.scale) else {"output_scale": scale.output_scale}
    return {"scale": scale.scale, **own, **varying}


@dataclass(frozen=True)
class GraphQuantizer:
    """An activation quantizer in a graph.

    Args:
        scale: its quantization parameters.
        now: for each of `step_columns(scale)` the number of the present sampling step.
    """

    scale: ActivationScale
    now: Mapping[str, Node]

    @property
    def offset(self) -> Node | None:
        """Offset of the grid; None for 0."""
        value = float(self.scale.table.offset[0])
        return self.now.get("offset", constant(value) if value else None)

    @property
    def zero_point_varies(self) -> bool:
        """Whether the code of zero changes with the step or the tensor."""
        scale = self.scale
        return "shift" in self.now or (isinstance(scale, RuntimeScale) and scale.source.spec.scheme == "affine")

    def centre(self, x: Node) -> Node:
        return x if self.offset is None else ops.subtract(x, self.offset).output(0)

    def quantize(self, x: Node, levels: int) -> Quantized:
        """Quantize centred `x` by a FakeQuantize with so many levels, at least as many as the quantizer has codes."""
        table, now = self.scale.table, self.now
        if isinstance(self.scale, RuntimeScale):
            now = runtime_numbers(x, self.scale, now)
        elif table.static:
            scale, zero_point, lowest, highest, gain, *_ = (float(column[0]) for column in table)
            x = prune(x, scale * float(table.dead_zone[0]), float(1 - table.pruned[0]))
            return Quantized(round_clamped(x, scale, lowest - zero_point, highest - zero_point, levels, gain))
        u, middle = ops.divide(x, now["scale"]), table.median_zero_point
        u = prune(u, now.get("dead_zone", float(table.dead_zone[0])), now.get("kept", float(1 - table.pruned[0])))
        if "shift" in now:
            u = ops.add(u, now["shift"])
        if "highest" in now:
            u = ops.minimum(u, now["highest"])
        if "lowest" in now:
            u = ops.maximum(u, now["lowest"])
        values = round_clamped(u, 1.0, float(table.lowest.min()) - middle, float(table.highest.max()) - middle, levels)
        return Quantized(values, now.get("output_scale", now["scale"]), now.get("shift"))

    def fake_quantize(self, x: Node) -> Node:
        values, scale, shift = self.quantize(self.centre(x), self.scale.table.num_codes)
        real = values if shift is None else ops.subtract(values, shift)
        real = real if scale is None else ops.multiply(real, scale)
        return real if self.offset is None else ops.add(real, self.offset)


def runtime_numbers(x: Node, runtime: RuntimeScale, now: Mapping[str, Node]) -> dict[str, Node]:
    """Scale, and shift if the zero point varies, of the tensor: as those of a step in `GraphQuantizer.now`."""
    source, gain = runtime.source, float(runtime.table.gain[0])
    if isinstance(source, DynamicGeneratorScale):
        numbers = {"scale": scale_from_statistics(x, source, now)}
    else:
        numbers = scale_from_range(x, source)
    return numbers if gain == 1 else {**numbers, "output_scale": ops.multiply(numbers["scale"], constant(gain))}


def scale_from_range(x: Node, source: DynamicScale) -> dict[str, Node]:
    """Scale, and zero point minus half of the levels, from the range of `x` widened to include zero (`DynamicScale`)."""
    spec, over, zero = source.spec, axes_from(x, 0 if source.config.granularity == "tensor" else 1), constant(0.0)
    low = ops.multiply(ops.minimum(ops.reduce_min(x, over, keep_dims=True), zero), constant(source.ratio))
    high = ops.multiply(ops.maximum(ops.reduce_max(x, over, keep_dims=True), zero), constant(source.ratio))
    width, intervals = {
        "symmetric": lambda: (ops.maximum(ops.negative(low), high), (spec.levels - 2) / 2),
        "unsigned": lambda: (high, float(spec.levels - 1)),
        "affine": lambda: (ops.subtract(high, low), float(spec.levels - 1)),
    }[spec.scheme]()
    scale = ops.maximum(ops.divide(width, constant(intervals)), constant(SMALLEST_SCALE))
    if spec.scheme != "affine":
        return {"scale": scale}
    zero_point = ops.round(ops.divide(ops.negative(low), scale), "half_to_even")
    return {"scale": scale, "shift": ops.subtract(zero_point, constant(float(spec.levels // 2)))}


@torch.no_grad()
def scale_from_statistics(x: Node, source: DynamicGeneratorScale, now: Mapping[str, Node]) -> Node:
    """Scale of every sample from the network of its statistics and of the timestep (`DynamicGeneratorScale`)."""
    over = axes_from(x, 1)
    reach = source.scale * source.spec.qmax
    mean = ops.reduce_mean(x, over, keep_dims=True)
    deviation = ops.subtract(x, mean)
    variance = ops.reduce_mean(ops.multiply(deviation, deviation), over, keep_dims=True)
    linear = [ops.reduce_min(x, over, keep_dims=True), ops.reduce_max(x, over, keep_dims=True), mean]
    statistics = [*(ops.divide(value, constant(reach)) for value in linear)]
    statistics.append(ops.divide(variance, constant(reach.square())))
    hidden = ops.reshape(ops.concat(statistics, 1), integers(-1, STATISTICS), False)
    first, *others = source.mlp
    hidden = ops.matmul(hidden, constant(first.weight[:, :STATISTICS]), False, True)  # type: ignore[index]
    hidden = ops.add(hidden, step_input(source, first, now))  # type: ignore[arg-type]
    for layer in others:
        if isinstance(layer, nn.ReLU):
            hidden = ops.relu(hidden)
        elif isinstance(layer, nn.Linear):
            hidden = ops.add(ops.matmul(hidden, constant(layer.weight), False, True), constant(layer.bias))
    bias = softplus_inverse(source.scale.double()).to(source.scale)
    factor = source.scale / nn.functional.softplus(bias)
    scale = ops.multiply(softplus(ops.add(hidden, constant(bias))), constant(factor))
    return ops.reshape(ops.maximum(scale, constant(SMALLEST_SCALE)), integers(-1, *(1,) * (rank_of(x) - 1)), False)


def step_input(source: DynamicGeneratorScale, first: nn.Linear, now: Mapping[str, Node]) -> Node:
    """Part of the network's first layer that does not depend on the tensor: its bias and the encoding of the timestep."""
    if source.encoding is None:
        return constant(first.bias)
    encoded = source.encoding(torch.tensor(source.context.timesteps)).to(first.weight)
    table = encoded @ first.weight[:, STATISTICS:].mT + first.bias
    return ops.gather(constant(table), ops.convert(now["step"], "i64"), ops.constant(0))


def softplus(u: Node) -> Node:
    """log(1 + e^u) = max(u, 0) + log1p(y), y = e^-|u|; OpenVINO's own loses the digits of e^u below zero."""
    y = ops.exp(ops.negative(ops.abs(u)))
    log1p = ops.multiply(constant(2.0), ops.atanh(ops.divide(y, ops.add(y, constant(2.0)))))
    return ops.add(ops.maximum(u, constant(0.0)), log1p)


def axes_from(x: Node, first: int) -> Node:
    return integers(*range(first, rank_of(x)))


def prune(u: Node, dead_zone: Node | float, kept: Node | float) -> Node:
    """Reduce magnitudes by `dead_zone`, to 0 at least, and divide them by `kept` (QIL)."""
    if isinstance(dead_zone, float) and dead_zone == 0:
        return u
    dead_zone, kept = (constant(value) if isinstance(value, float) else value for value in (dead_zone, kept))
    middle = ops.maximum(ops.minimum(u, dead_zone), ops.negative(dead_zone))
    return ops.divide(ops.subtract(u, middle), kept)


def round_clamped(u: Node, scale: float, lowest: float, highest: float, levels: int, gain: float = 1.0) -> Node:
    """Gain * scale * clamp(round(u / scale), lowest, highest), by a FakeQuantize that starts at `lowest`.

    Args:
        u: of any shape.
        scale: width of a step of `u`, above 0.
        lowest: smallest integer after the clamp.
        highest: largest one.
        levels: of the FakeQuantize, at least highest - lowest + 1; 256 for execution in eight-bit integers.
        gain: factor of the outputs.
    """
    if int(highest - lowest) + 1 < levels:
        u = ops.clamp(u, scale * lowest, scale * highest)
    ends = [scale * end for end in (lowest, lowest + levels - 1)]
    return ops.fake_quantize(u, *map(constant, ends), *(constant(gain * end) for end in ends), levels)

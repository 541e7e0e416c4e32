"""Activations on their grids, in OpenVINO's operations: whatever a grid is, its codes leave a FakeQuantize with constant ends.

The plugin takes what such an operation of 256 levels gives as bytes. What changes from step to step or from tensor to tensor
therefore stands before and after it:

    v = FakeQuantize(shrunk((x - offset) / scale) + (zero point - centre)),   x ~ unit (v - (zero point - centre)) + offset
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import openvino.opset13 as ops
import torch
from torch import Tensor, nn

from tfmq_exp.deploy.activations import Grid, LiveGrid
from tfmq_exp.quant.functional import SMALLEST_SCALE
from tfmq_exp.quant.scales.dynamic import DynamicScale
from tfmq_exp.quant.scales.dynamic_generator import STATISTICS, DynamicGeneratorScale
from tfmq_exp.quant.scales.generator import softplus_inverse

Node = Any  # openvino's nodes and outputs


class Levels(NamedTuple):
    """Centred x as unit (values - shift); None stands for 1 and for 0."""

    values: Node
    unit: Node | None = None
    shift: Node | None = None


def constant(value: Tensor | float) -> Node:
    """A float32 constant."""
    return ops.constant(torch.as_tensor(value, dtype=torch.float32).detach().cpu().numpy())


def columns(grid: Grid | None) -> dict[str, Tensor]:
    """What of a grid changes with the step, each [steps]: to be looked up at run time."""
    if isinstance(grid, LiveGrid):
        reads_time = isinstance(grid.source, DynamicGeneratorScale) and grid.source.encoding is not None
        return {"step": torch.arange(grid.source.context.num_steps)} if reads_time else {}  # type: ignore[union-attr]
    if grid is None or grid.static:
        return {}
    found = {"scale": grid.scale, "unit": grid.unit, "shift": grid.zero_point - grid.centre}
    found |= {"lowest": grid.lowest - grid.centre, "highest": grid.highest - grid.centre}
    found |= {"offset": grid.offset, "dead": grid.dead, "kept": 1 - grid.pruned}
    if torch.equal(grid.unit, grid.scale):
        del found["unit"]
    return {name: part for name, part in found.items() if name in ("scale", "unit") or bool((part != part[0]).any())}


def offset_of(grid: Grid, at: Mapping[str, Node]) -> Node | None:
    """What the grid is centred on, None for 0."""
    if "offset" in at:
        return at["offset"]
    value = grid.rule.offset if isinstance(grid, LiveGrid) else float(grid.offset[0])
    return constant(value) if value else None


def centred(x: Node, grid: Grid, at: Mapping[str, Node]) -> Node:
    """`x` minus its grid's offset."""
    offset = offset_of(grid, at)
    return x if offset is None else ops.subtract(x, offset).output(0)


def moves(grid: Grid, at: Mapping[str, Node]) -> bool:
    """Whether zero has another code at another time."""
    return "shift" in at or (isinstance(grid, LiveGrid) and grid.spec.scheme == "affine")


def levels(x: Node, grid: Grid, at: Mapping[str, Node], count: int) -> Levels:
    """Centred `x` on its grid, by a FakeQuantize with `count` levels.

    Args:
        x: real, its grid's offset subtracted.
        grid: of `x`.
        at: the present step's number for each of `columns(grid)`.
        count: at least as many as the grid has integers.
    """
    if isinstance(grid, LiveGrid):
        return live_levels(x, grid, at, count)
    if grid.static:
        scale, zero_point, gain = (float(part[0]) for part in (grid.scale, grid.zero_point, grid.gain))
        lowest, highest = float(grid.lowest[0]) - zero_point, float(grid.highest[0]) - zero_point
        x = shrunk(x, scale * float(grid.dead[0]), float(1 - grid.pruned[0]))
        return Levels(rounded(x, scale, lowest, highest, count, gain))
    base = float(grid.lowest.min()) - grid.centre
    u = ops.divide(x, at["scale"])
    u = shrunk(u, at.get("dead", float(grid.dead[0])), at.get("kept", float(1 - grid.pruned[0])))
    if "shift" in at:
        u = ops.add(u, at["shift"])
    if "highest" in at:
        u = ops.minimum(u, at["highest"])
    if "lowest" in at:
        u = ops.maximum(u, at["lowest"])
    highest = float(grid.highest.max()) - grid.centre
    return Levels(rounded(u, 1.0, base, highest, count), at.get("unit", at["scale"]), at.get("shift"))


def live_levels(x: Node, grid: LiveGrid, at: Mapping[str, Node], count: int) -> Levels:
    """With the scale and zero point of the tensor at hand."""
    spec, rule = grid.spec, grid.rule
    if isinstance(grid.source, DynamicGeneratorScale):
        scale, shift = generated(x, grid.source, at), None
    else:
        scale, shift = from_ends(x, grid.source)
    u = shrunk(ops.divide(x, scale), rule.pruned * rule.highest, 1 - rule.pruned)
    unit = scale if rule.gain == 1 else ops.multiply(scale, constant(rule.gain))
    if shift is None:
        return Levels(rounded(u, 1.0, rule.lowest, rule.highest, count), unit)
    centre = spec.levels // 2
    u = ops.add(u, shift)
    return Levels(rounded(u, 1.0, rule.lowest - centre, rule.highest - centre, count), unit, shift)


def from_ends(x: Node, source: DynamicScale) -> tuple[Node, Node | None]:
    """Scale, and zero point minus half of the levels, from the ends of `x` widened to hold zero: `quant.scales.dynamic`."""
    spec, over, zero = source.spec, axes_of(x, 0 if source.config.granularity == "tensor" else 1), constant(0.0)
    low = ops.multiply(ops.minimum(ops.reduce_min(x, over, keep_dims=True), zero), constant(source.ratio))
    high = ops.multiply(ops.maximum(ops.reduce_max(x, over, keep_dims=True), zero), constant(source.ratio))
    if spec.scheme == "symmetric":
        reach = ops.maximum(ops.negative(low), high)
        scale = ops.divide(reach, constant((spec.levels - 2) / 2))
    elif spec.scheme == "unsigned":
        scale = ops.divide(high, constant(float(spec.levels - 1)))
    else:
        scale = ops.divide(ops.subtract(high, low), constant(float(spec.levels - 1)))
    scale = ops.maximum(scale, constant(SMALLEST_SCALE))
    if spec.scheme != "affine":
        return scale, None
    zero_point = ops.round(ops.divide(ops.negative(low), scale), "half_to_even")
    return scale, ops.subtract(zero_point, constant(float(spec.levels // 2)))


@torch.no_grad()
def generated(x: Node, source: DynamicGeneratorScale, at: Mapping[str, Node]) -> Node:
    """Every sample's scale from the network of its statistics and of the step: `quant.scales.dynamic_generator`."""
    over, rank = axes_of(x, 1), x.get_partial_shape().rank.get_length()
    reach = source.scale * source.spec.qmax
    mean = ops.reduce_mean(x, over, keep_dims=True)
    away = ops.subtract(x, mean)
    found = [ops.reduce_min(x, over, keep_dims=True), ops.reduce_max(x, over, keep_dims=True), mean]
    found = [ops.divide(each, constant(reach)) for each in found]
    variance = ops.reduce_mean(ops.multiply(away, away), over, keep_dims=True)
    read = ops.concat([*found, ops.divide(variance, constant(reach.square()))], 1)
    hidden = ops.reshape(read, ops.constant(np.array([-1, STATISTICS], np.int64)), False)
    first, *others = source.mlp
    hidden = ops.matmul(hidden, constant(first.weight[:, :STATISTICS]), False, True)  # type: ignore[index]
    hidden = ops.add(hidden, of_step(source, first, at))  # type: ignore[arg-type]
    for layer in others:
        if isinstance(layer, nn.ReLU):
            hidden = ops.relu(hidden)
        elif isinstance(layer, nn.Linear):
            hidden = ops.add(ops.matmul(hidden, constant(layer.weight), False, True), constant(layer.bias))
    bias = softplus_inverse(source.scale.double()).to(source.scale)
    factor = source.scale / nn.functional.softplus(bias)
    scale = ops.multiply(softplus(ops.add(hidden, constant(bias))), constant(factor))
    scale = ops.maximum(scale, constant(SMALLEST_SCALE))
    return ops.reshape(scale, ops.constant(np.array([-1, *(1,) * (rank - 1)], np.int64)), False)


def softplus(u: Node) -> Node:
    """log(1 + e^u) = max(u, 0) + log1p(y), y = e^-|u|; OpenVINO's own loses the digits of e^u below zero."""
    y = ops.exp(ops.negative(ops.abs(u)))
    log1p = ops.multiply(constant(2.0), ops.atanh(ops.divide(y, ops.add(y, constant(2.0)))))
    return ops.add(ops.maximum(u, constant(0.0)), log1p)


def of_step(source: DynamicGeneratorScale, first: nn.Linear, at: Mapping[str, Node]) -> Node:
    """What the network's first layer adds that does not depend on the tensor: its bias, and its part of the timestep."""
    if source.encoding is None:
        return constant(first.bias)
    encoded = source.encoding(torch.tensor(source.context.timesteps)).to(first.weight)
    table = encoded @ first.weight[:, STATISTICS:].mT + first.bias
    return ops.gather(constant(table), ops.convert(at["step"], "i64"), ops.constant(0))


def axes_of(x: Node, first: int) -> Node:
    """The axes of `x` from one on."""
    return ops.constant(np.arange(first, x.get_partial_shape().rank.get_length(), dtype=np.int64))


def shrunk(u: Node, dead: Node | float, kept: Node | float) -> Node:
    """Magnitudes less `dead`, at least 0, over `kept`, with the sign of `u`."""
    if isinstance(dead, float) and isinstance(kept, float):
        return u if dead == 0 else ops.divide(ops.subtract(u, ops.clamp(u, -dead, dead)), constant(kept))
    dead, kept = (constant(part) if isinstance(part, float) else part for part in (dead, kept))
    middle = ops.maximum(ops.minimum(u, dead), ops.negative(dead))
    return ops.divide(ops.subtract(u, middle), kept)


def rounded(u: Node, scale: float, lowest: float, highest: float, count: int, gain: float = 1.0) -> Node:
    """Gain scale clamp(round(u / scale), lowest, highest), the ends given as integers."""
    width = int(highest - lowest) + 1
    if width < count:
        u = ops.clamp(u, scale * lowest, scale * highest)
    ends = [scale * end for end in (lowest, lowest + count - 1)]
    return ops.fake_quantize(u, *map(constant, ends), *(constant(gain * end) for end in ends), count)


def on_grid(x: Node, grid: Grid, at: Mapping[str, Node]) -> Node:
    """`x` quantized and turned back into real numbers."""
    values, unit, shift = levels(centred(x, grid, at), grid, at, grid.width)
    if shift is not None:
        values = ops.subtract(values, shift)
    offset = offset_of(grid, at)
    real = values if unit is None else ops.multiply(values, unit)
    return real if offset is None else ops.add(real, offset)

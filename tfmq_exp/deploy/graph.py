"""Layers in OpenVINO's operations, as its CPU plugin executes them in eight-bit integers.

The plugin takes a convolution or matrix product to integers where its input comes from a FakeQuantize with 256 levels and
constant ends (`levels`), and its weight from signed bytes with zero point 0. With v, unit, shift and offset of the input:

    y = unit (W v - shift sum of W) + offset (W 1) + bias

where 1 is an input of ones: padding is 0 and no offset, so at the borders W 1 has fewer terms.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import openvino as ov
import openvino.opset13 as ops
import torch
from torch import Tensor, nn

from tfmq_exp.deploy.activations import BYTE_VALUES
from tfmq_exp.deploy.levels import Node, centred, constant, levels, moves, offset_of, on_grid
from tfmq_exp.deploy.sites import Piece, Site
from tfmq_exp.deploy.weights import PAIR_SAFE, SignedWeight, per_row

# weights -------------------------------------------------------------------------------------------------------------


def nibbles(codes: Tensor) -> Node:
    """A constant of unsigned four-bit integers, two in a byte, the first in the low half."""
    flat = codes.flatten().numpy()
    flat = np.append(flat, np.zeros(flat.size % 2, np.uint8))
    tensor = ov.Tensor(ov.Type.u4, ov.Shape(list(codes.shape)))
    tensor.data.reshape(-1)[:] = flat[0::2] | (flat[1::2] << 4)
    return ops.constant(tensor)


def shaped(values: Tensor, dims: int, dtype: Any) -> Node:
    """A constant with one value per output channel."""
    return ops.constant(per_row(values, dims).numpy().astype(dtype))


def integer_weight(weight: SignedWeight, *, halved: bool) -> Node:
    """Signed bytes times scales: the weight or its two halves, and the channel of ones where it is needed."""
    dims, copies = weight.stored.dim(), 2 if halved else 1
    ones = [] if weight.exact else [torch.ones(1)]
    scales = shaped(torch.cat([*[weight.scale] * copies, *ones]), dims, np.float32)
    if weight.bits <= 4 and not halved:  # four bits on the disk, bytes as soon as it is loaded
        stored = torch.cat([weight.stored, *(torch.ones_like(weight.stored[:1]) for _ in ones)])
        shift = torch.cat([weight.shift, *(torch.zeros_like(weight.shift[:1]) for _ in ones)])
        signed = ops.subtract(ops.convert(nibbles(stored), "i8"), shaped(shift, dims, np.int8))
    elif halved:  # as `weights.halves`, but on the disk the weight is whole
        whole = ops.convert(ops.constant(weight.signed.numpy()), "f32")
        low = ops.floor(ops.multiply(whole, constant(0.5)))
        rows = [low, ops.subtract(whole, low), *(constant(torch.ones_like(weight.signed[:1])) for _ in ones)]
        signed = ops.convert(ops.concat(rows, 0), "i8")
    else:
        signed = ops.constant(torch.cat([weight.signed, *(torch.ones_like(weight.signed[:1]) for _ in ones)]).numpy())
    return ops.multiply(ops.convert(signed, "f32"), scales)


def float_weight(piece: Piece, real: Tensor) -> Node:
    """A weight that is multiplied in floating point, still stored as integers where it is integer."""
    weight = piece.weight
    if weight is None:
        return constant(real)
    stored = nibbles(weight.stored) if weight.bits <= 4 else ops.constant(weight.stored.numpy())
    zero_point = shaped(weight.shift - weight.offset, real.dim(), np.float32)
    centred = ops.subtract(ops.convert(stored, "f32"), zero_point)
    return ops.multiply(centred, shaped(weight.scale, real.dim(), np.float32))


# layers --------------------------------------------------------------------------------------------------------------


def product(layer: nn.Module, x: Node, weight: Node, padding: tuple[int, int]) -> Node:
    """The layer's product without its bias."""
    if isinstance(layer, nn.Conv2d):
        return ops.convolution(x, weight, list(layer.stride), list(padding), list(padding), list(layer.dilation))
    return ops.matmul(x, weight, False, True)


def along_outputs(layer: nn.Module, values: Tensor) -> Node:
    """A constant per output channel that broadcasts against the layer's output."""
    return constant(values.reshape(-1, 1, 1) if isinstance(layer, nn.Conv2d) else values)


def padding_of(layer: nn.Module) -> tuple[int, int]:
    """Rows and columns of zeros on each side."""
    if not isinstance(layer, nn.Conv2d):
        return 0, 0
    if isinstance(layer.padding, str):
        raise ValueError(f"a convolution with padding={layer.padding!r}; numbers are understood")
    return layer.padding[0], layer.padding[1]


def integer_product(
    layer: nn.Module, piece: Piece, x: Node, at: Mapping[str, Node], pairs_saturate: bool
) -> tuple[Node, Node]:
    """One piece in integers: its output without bias, and the node that must be found executed in integers."""
    assert piece.weight is not None
    assert piece.grid is not None
    padding, weight, offset = padding_of(layer), piece.weight, offset_of(piece.grid, at)
    ones = None if offset is None else of_ones(layer, weight, x)
    x = centred(x, piece.grid, at)
    if moves(piece.grid, at) and any(padding):  # padded zeros must get the step's own zero point
        edges = ops.constant(np.array([0, 0, *padding], np.int64))
        x, padding = ops.pad(x, edges, edges, "constant", constant(0.0)).output(0), (0, 0)
    values, unit, shift = levels(x, piece.grid, at, BYTE_VALUES)
    halved = pairs_saturate and weight.reach > PAIR_SAFE
    core = product(layer, values, integer_weight(weight, halved=halved), padding)
    y = gathered(layer, core, weight, 2 if halved else 1)
    if shift is not None:
        y = ops.subtract(y, ops.multiply(shift, along_outputs(layer, weight.sums)))
    if unit is not None:
        y = ops.multiply(y, unit)
    return (y if ones is None else ops.add(y, ops.multiply(ones, offset))), core


def of_ones(layer: nn.Module, weight: SignedWeight, x: Node) -> Node:
    """What the layer makes of ones in the shape of `x`: its sums of weights, less at padded borders."""
    padding = padding_of(layer)
    if not any(padding):
        return along_outputs(layer, weight.sums)
    sizes = ops.gather(ops.shape_of(x), ops.constant(np.array([2, 3])), ops.constant(0))
    shape = ops.concat([ops.constant(np.array([1, 1], np.int64)), sizes], 0)
    return product(layer, ops.broadcast(constant(1.0), shape), constant(weight.taps), padding)


def gathered(layer: nn.Module, rows: Node, weight: SignedWeight, copies: int) -> Node:
    """One output from the channels of `integer_weight`: halves are added, what the ones found is weighted."""
    sizes = [len(weight.scale)] * copies + ([] if weight.exact else [1])
    if len(sizes) == 1:
        return rows
    axis = ops.constant(1 if isinstance(layer, nn.Conv2d) else -1)
    parts = ops.variadic_split(rows, axis, ops.constant(np.array(sizes, np.int64)))
    y = parts.output(0) if copies == 1 else ops.add(parts.output(0), parts.output(1))
    if weight.exact:
        return y
    return ops.add(y, ops.multiply(parts.output(copies), along_outputs(layer, weight.scale * weight.offset)))


def float_product(layer: nn.Module, piece: Piece, real: Tensor, x: Node, at: Mapping[str, Node]) -> Node:
    """One piece in floating point, on quantized operands where they are."""
    if piece.grid is not None:
        x = on_grid(x, piece.grid, at)
    return product(layer, x, float_weight(piece, real), padding_of(layer))


def whole_site(site: Site, x: Node, at: Mapping[str, Node], *, pairs_saturate: bool = False) -> tuple[Node, list[Node]]:
    """A layer with all its pieces, bias and output quantizer; and its products, if they are integer.

    Args:
        site: the layer.
        x: its input.
        at: the present step's numbers, by `0.scale`, ... for the first piece, `output.scale`, ... for the output.
        pairs_saturate: the processor adds pairs of products in sixteen bits; weights above 64 are executed in halves.
    """
    layer, cores = site.layer, []
    axis = 1 if isinstance(layer, nn.Conv2d) else -1
    sizes = [piece.channels for piece in site.pieces]
    inputs = [x]
    if len(sizes) > 1:
        split = ops.variadic_split(x, ops.constant(axis), ops.constant(np.array(sizes, np.int64)))
        inputs = [split.output(i) for i in range(len(sizes))]
    y = None
    for i, (piece, part, real) in enumerate(zip(site.pieces, inputs, layer.weight.split(sizes, dim=1), strict=True)):
        own = named(at, str(i))
        if site.integer:
            term, core = integer_product(layer, piece, part, own, pairs_saturate)
            cores.append(core)
        else:
            term = float_product(layer, piece, real, part, own)
        y = term if y is None else ops.add(y, term)
    bias: Any = layer.bias
    if bias is not None:
        y = ops.add(y, along_outputs(layer, bias))
    if site.output is not None:
        y = on_grid(y, site.output, named(at, "output"))
    return y, cores


def named(at: Mapping[str, Node], prefix: str) -> dict[str, Node]:
    """The numbers whose names start with a prefix, without it."""
    return {name.partition(".")[2]: node for name, node in at.items() if name.startswith(f"{prefix}.")}


def group_norm(norm: nn.GroupNorm, x: Node) -> Node:
    """GroupNorm by MVN: the plugin's own GroupNormalization becomes slow beside quantized operations."""
    rank = x.get_partial_shape().rank.get_length()
    grouped = ops.reshape(x, ops.constant(np.array([0, norm.num_groups, -1], np.int64)), True)
    normal = ops.mvn(grouped, ops.constant(np.array([2], np.int64)), True, norm.eps, "INSIDE_SQRT")
    y = ops.reshape(normal, ops.shape_of(x), False)
    if norm.affine:
        shape = (-1, *(1,) * (rank - 2))
        y = ops.multiply(y, constant(norm.weight.reshape(shape)))
        y = ops.add(y, constant(norm.bias.reshape(shape)))
    return y

"""Layers as OpenVINO operations that its CPU plugin executes in eight-bit integers.

The plugin does so for a convolution or matrix product whose input comes from a FakeQuantize with 256 levels and constant ends
(`fake_quantize`), and whose weight from signed bytes with zero point 0. With values, scale, shift and offset of the input:

    y = scale * (W values - shift * sum(W)) + offset * (W 1) + bias

where 1 is an input of ones: padding is 0, not the offset, so W 1 has fewer terms at the borders.
"""

import functools
from collections.abc import Mapping
from typing import Any

import numpy as np
import openvino as ov
import openvino.opset13 as ops
from torch import Tensor, nn

from tfmq_exp.deploy.activation_tables import BYTE_VALUES
from tfmq_exp.deploy.layer_report import DeployedLayer, DeployedProduct
from tfmq_exp.deploy.openvino.fake_quantize import GraphQuantizer, Node, constant, integers, rank_of, step_columns
from tfmq_exp.deploy.weight_tables import SignedWeight, per_row

# weights -------------------------------------------------------------------------------------------------------------


def four_bits(codes: Tensor) -> Node:
    """Make a constant of unsigned four-bit integers, two in a byte, the first in the low half."""
    flat = codes.flatten().numpy()
    flat = np.append(flat, np.zeros(flat.size % 2, np.uint8))
    tensor = ov.Tensor(ov.Type.u4, ov.Shape(list(codes.shape)))
    tensor.data.reshape(-1)[:] = flat[0::2] | (flat[1::2] << 4)
    return ops.constant(tensor)


def per_output(values: Tensor, dims: int, dtype: Any) -> Node:
    """Make a constant with one value per output channel of a weight."""
    return ops.constant(per_row(values, dims).numpy().astype(dtype))


def integer_weight(weight: SignedWeight, summands: int) -> Node:
    """Signed bytes times scales: the weight, or its two summands one above the other."""
    if weight.bits <= 4 and summands == 1:  # four bits in the file, bytes once it is loaded
        shift = per_output(weight.shift, weight.stored.dim(), np.int8)
        signed = ops.subtract(ops.convert(four_bits(weight.stored), "i8"), shift)
    else:
        signed = ops.constant(weight.signed.numpy())
    if summands == 2:  # `split_in_two` in the graph: in the file the weight is whole
        whole = ops.convert(signed, "f32")
        low = ops.floor(ops.multiply(whole, constant(0.5)))
        signed = ops.convert(ops.concat([low, ops.subtract(whole, low)], 0), "i8")
    scale = per_output(weight.scale.repeat(summands), weight.stored.dim(), np.float32)
    return ops.multiply(ops.convert(signed, "f32"), scale)


def float_weight(weight: SignedWeight | None, real: Tensor) -> Node:
    """Weight of a floating-point product; stored as integers if it is quantized."""
    if weight is None:
        return constant(real)
    stored = four_bits(weight.stored) if weight.bits <= 4 else ops.constant(weight.stored.numpy())
    zero_point = per_output(weight.shift - weight.offset, real.dim(), np.float32)
    centred = ops.subtract(ops.convert(stored, "f32"), zero_point)
    return ops.multiply(centred, per_output(weight.scale, real.dim(), np.float32))


# layers --------------------------------------------------------------------------------------------------------------


def multiply(layer: nn.Module, x: Node, weight: Node, padding: tuple[int, int]) -> Node:
    if isinstance(layer, nn.Conv2d):
        return ops.convolution(x, weight, list(layer.stride), list(padding), list(padding), list(layer.dilation))
    return ops.matmul(x, weight, False, True)


def along_outputs(layer: nn.Module, values: Tensor) -> Node:
    """Make a constant per output channel that broadcasts against the layer's output."""
    return constant(per_row(values, 3) if isinstance(layer, nn.Conv2d) else values)


def integer_product(
    deployed: DeployedLayer, product: DeployedProduct, x: Node, now: Mapping[str, Node], pairs_saturate: bool
) -> tuple[Node, Node]:
    """Output of a product in integers, without bias; and the node that the plugin must execute in integers.

    Args:
        deployed: the layer.
        product: one of its products, with a quantized weight and input.
        x: input of the product, [batch, channels, height, width] or [..., features].
        now: for each of `layer_columns(deployed)` the number of the present sampling step.
        pairs_saturate: see `layer_graph`.
    """
    assert product.weight is not None
    assert product.input is not None
    layer, weight, padding, axis = deployed.layer, product.weight, deployed.padding, ops.constant(deployed.axis)
    quantizer, summands = GraphQuantizer(product.input, now), product.weight.summands(pairs_saturate)
    ones = None if quantizer.offset is None else product_of_ones(deployed, weight, x)
    x = quantizer.centre(x)
    if quantizer.zero_point_varies and any(padding):  # padded zeros need the zero point of the step
        edges = integers(0, 0, *padding)
        x, padding = ops.pad(x, edges, edges, "constant", constant(0.0)).output(0), (0, 0)
    values, scale, shift = quantizer.quantize(x, BYTE_VALUES)
    core = y = multiply(layer, values, integer_weight(weight.extended, summands), padding)
    if summands == 2:
        y = ops.add(*ops.split(y, axis, 2).outputs())
    if not weight.exact:
        y, sums = ops.variadic_split(y, axis, integers(len(weight.scale), 1)).outputs()
        y = ops.add(y, ops.multiply(sums, along_outputs(layer, weight.scale * weight.offset)))
    if shift is not None:
        y = ops.subtract(y, ops.multiply(shift, along_outputs(layer, weight.sums)))
    if scale is not None:
        y = ops.multiply(y, scale)
    return (y if ones is None else ops.add(y, ops.multiply(ones, quantizer.offset))), core


def product_of_ones(deployed: DeployedLayer, weight: SignedWeight, x: Node) -> Node:
    """Product of an input of ones in the shape of `x`: sums of weights, less at padded borders."""
    if not any(deployed.padding):
        return along_outputs(deployed.layer, weight.sums)
    sizes = ops.gather(ops.shape_of(x), integers(2, 3), ops.constant(0))
    shape = ops.concat([integers(1, 1), sizes], 0)
    return multiply(deployed.layer, ops.broadcast(constant(1.0), shape), constant(weight.taps), deployed.padding)


def layer_columns(deployed: DeployedLayer) -> dict[str, Tensor]:
    """Parameters of a layer that change with the step, each [steps]: `0.scale` of its first input, `output.scale`, ..."""
    scales = {str(i): product.input for i, product in enumerate(deployed.products)} | {"output": deployed.output}
    return {f"{key}.{name}": column for key, scale in scales.items() for name, column in step_columns(scale).items()}


def layer_graph(
    deployed: DeployedLayer, x: Node, now: Mapping[str, Node], *, pairs_saturate: bool = False
) -> tuple[Node, list[Node]]:
    """A layer with its products, bias and output quantizer; and the nodes of those products that are in integers.

    Args:
        deployed: the layer.
        x: its input.
        now: for each of `layer_columns(deployed)` the number of the present sampling step.
        pairs_saturate: whether the processor adds pairs of products in sixteen bits; weights above 64 are then split in two.
    """
    layer, cores, terms = deployed.layer, list[Node](), list[Node]()
    sizes = [product.channels for product in deployed.products]
    inputs = [x]
    if len(sizes) > 1:
        inputs = ops.variadic_split(x, ops.constant(deployed.axis), integers(*sizes)).outputs()
    weights = layer.weight.split(sizes, dim=1)
    for i, (product, part, real) in enumerate(zip(deployed.products, inputs, weights, strict=True)):
        own = numbers_of(now, str(i))
        if deployed.integer:
            term, core = integer_product(deployed, product, part, own, pairs_saturate)
            cores.append(core)
        else:
            part = part if product.input is None else GraphQuantizer(product.input, own).fake_quantize(part)
            term = multiply(layer, part, float_weight(product.weight, real), deployed.padding)
        terms.append(term)
    bias: Any = layer.bias
    y = functools.reduce(ops.add, terms if bias is None else [*terms, along_outputs(layer, bias)])
    if deployed.output is not None:
        y = GraphQuantizer(deployed.output, numbers_of(now, "output")).fake_quantize(y)
    return y, cores


def numbers_of(now: Mapping[str, Node], key: str) -> dict[str, Node]:
    """Numbers of one input or of the output, by name without the key."""
    return {name.partition(".")[2]: node for name, node in now.items() if name.startswith(f"{key}.")}


def group_norm(norm: nn.GroupNorm, x: Node) -> Node:
    """GroupNorm by MVN: the plugin's own GroupNormalization is slow next to quantized operations."""
    grouped = ops.reshape(x, integers(0, norm.num_groups, -1), True)
    y = ops.reshape(ops.mvn(grouped, integers(2), True, norm.eps, "INSIDE_SQRT"), ops.shape_of(x), False)
    if not norm.affine:
        return y
    weight, bias = (constant(per_row(values, rank_of(x) - 1)) for values in (norm.weight, norm.bias))
    return ops.add(ops.multiply(y, weight), bias)

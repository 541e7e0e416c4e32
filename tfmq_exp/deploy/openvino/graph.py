"""Layers and quantizers as torch code that is traced, around operations of OpenVINO that its CPU plugin executes in bytes.

The plugin does so for a convolution or matrix product whose input comes from a FakeQuantize with 256 levels and constant ends,
and whose weight from signed bytes with zero point 0. What changes with the sampling step or with the tensor is therefore
applied before and after it, the middle being the median zero point:

    v = FakeQuantize(prune((x - offset) / scale) + shift)                 shift = zero_point - middle
    x ~ output_scale * (v - shift) + offset
    y = output_scale * (W v - shift * sum(W)) + offset * (W 1) + bias

where 1 is an input of ones: padding is 0, not the offset, so W 1 has fewer terms at the borders.
"""

from typing import Any, NamedTuple

import numpy as np
import openvino as ov
import openvino.opset13 as ops
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tfmq_exp.deploy.activation_tables import BYTE_VALUES, ActivationScale, RuntimeScale, varies
from tfmq_exp.deploy.layers import ByteProduct, DeployedLayer, DeployedProduct, Product
from tfmq_exp.deploy.weight_tables import SignedWeight, per_row
from tfmq_exp.quant.timestep_context import TimestepContext

Node = Any  # openvino's nodes and outputs


class GraphOperation(nn.Module):
    """A module that becomes operations of OpenVINO; its own forward gives the shape of the output while it is traced."""

    def build(self, x: Node) -> Node:
        """Make the operations."""
        raise NotImplementedError


# quantizers ----------------------------------------------------------------------------------------------------------


class FakeQuantize(GraphOperation):
    """Gain * unit * clamp(round(u / unit), lowest, lowest + levels - 1)."""

    def __init__(self, unit: float, lowest: float, levels: int, gain: float) -> None:
        super().__init__()
        self.ends, self.gain, self.levels = (unit * lowest, unit * (lowest + levels - 1)), gain, levels

    def forward(self, u: Tensor) -> Tensor:
        return u

    def build(self, x: Node) -> Node:
        ends = *self.ends, *(self.gain * end for end in self.ends)
        return ops.fake_quantize(x, *map(constant, ends), self.levels)


class Quantized(NamedTuple):
    """Input minus its offset, as scale * (values - shift); None is a scale of 1 and a shift of 0."""

    values: Tensor
    scale: Tensor | None
    shift: Tensor | None


class GraphQuantizer(nn.Module):
    """An activation quantizer up to its FakeQuantize.

    Args:
        scale: its quantization parameters.
        context: of the sampling step; all rows are at the same.
        levels: of the FakeQuantize; the number of codes by default.
    """

    def __init__(self, scale: ActivationScale, context: TimestepContext, levels: int | None = None) -> None:
        super().__init__()
        self.scale, self.context, table = scale, context, scale.table
        self.source = scale.source if isinstance(scale, RuntimeScale) else None
        self.static = self.source is None and not varies(*table)
        self.middle = int(table.zero_point.median())
        # a static scale is that of the FakeQuantize itself
        self.unit, gain = (float(table.scale[0]), float(table.gain[0])) if self.static else (1.0, 1.0)
        self.levels = levels or table.num_codes
        self.fake_quantize = FakeQuantize(self.unit, float(table.lowest.min()) - self.middle, self.levels, gain)
        affine = self.source is not None and self.source.spec.scheme == "affine"
        self.zero_point_varies = affine or varies(table.zero_point)

    def at_step(self, column: Tensor) -> Tensor:
        """Number of the present step, looked up if it changes."""
        return column.index_select(0, self.context.index[:1]) if varies(column) else column[:1]

    @property
    def offset(self) -> Tensor | None:
        """Offset of the grid; None for 0."""
        offset = self.scale.table.offset
        return self.at_step(offset) if bool(offset.any()) else None

    def forward(self, x: Tensor) -> Quantized:
        """Quantize `x` minus its offset."""
        table, scale, shift, u = self.scale.table, None, None, x
        if self.source is not None:
            scale, zero_point = self.source(x)
            shift = zero_point - self.middle if self.zero_point_varies else None
        elif not self.static:
            scale = self.at_step(table.scale)
            shift = self.at_step(table.zero_point - self.middle) if self.zero_point_varies else None
        u = u if scale is None else u / scale
        if bool(table.pruned.any()):
            dead_zone = self.at_step(table.dead_zone) * self.unit
            u = (u - torch.maximum(torch.minimum(u, dead_zone), -dead_zone)) / self.at_step(1 - table.pruned)
        u = u if shift is None else u + shift
        if varies(table.lowest, table.highest):
            u = torch.maximum(
                torch.minimum(u, self.at_step(table.highest - self.middle)), self.at_step(table.lowest - self.middle)
            )
        elif table.num_codes < self.levels:
            u = u.clamp(*(self.unit * (float(end[0]) - self.middle) for end in (table.lowest, table.highest)))
        if scale is not None and bool((table.gain != 1).any()):
            scale = scale * self.at_step(table.gain)
        return Quantized(self.fake_quantize(u), scale, shift)


class RealQuantizer(nn.Module):
    """An activation quantizer in floating point."""

    def __init__(self, scale: ActivationScale, context: TimestepContext) -> None:
        super().__init__()
        self.quantizer = GraphQuantizer(scale, context)

    def forward(self, x: Tensor) -> Tensor:
        offset = self.quantizer.offset
        values, scale, shift = self.quantizer(x if offset is None else x - offset)
        real = values if shift is None else values - shift
        real = real if scale is None else real * scale
        return real if offset is None else real + offset


# products ------------------------------------------------------------------------------------------------------------


class Multiply(GraphOperation):
    """Product with a constant weight, without bias."""

    def __init__(
        self, deployed: DeployedLayer, weight: SignedWeight | None, real: Tensor, summands: int | None
    ) -> None:
        """`summands` of an integer product; None for one in floating point."""
        super().__init__()
        self.weight, self.real, self.summands = weight, real, summands
        out = len(real) if weight is None or summands is None else summands * len(weight.extended.scale)
        self.shape = (out, *real.shape[1:])
        self.geometry = deployed.geometry

    def forward(self, x: Tensor) -> Tensor:
        zeros = torch.zeros(self.shape)
        return F.linear(x, zeros) if self.geometry is None else F.conv2d(x, zeros, None, *self.geometry)

    def build(self, x: Node) -> Node:
        if self.summands is not None and self.weight is not None:
            weight = integer_weight(self.weight.extended, self.summands)
        else:
            weight = float_weight(self.weight, self.real)
        if self.geometry is None:
            return ops.matmul(x, weight, False, True)
        stride, padding, dilation = map(list, self.geometry)
        return ops.convolution(x, weight, stride, padding, padding, dilation)


class FloatProduct(Product):
    """A product in floating point, whose weight is stored as integers if it is quantized."""

    def __init__(
        self, deployed: DeployedLayer, product: DeployedProduct, real: Tensor, context: TimestepContext
    ) -> None:
        super().__init__()
        self.quantizer = nn.Identity() if product.input is None else RealQuantizer(product.input, context)
        self.multiply = Multiply(deployed, product.weight, real, None)

    def forward(self, x: Tensor, steps: Tensor) -> Tensor:
        return self.multiply(self.quantizer(x))


class IntegerProduct(ByteProduct):
    """A product that the plugin must execute in integers.

    Args:
        deployed: the layer.
        product: of its products, this one.
        real: the weight as real numbers.
        context: the timestep context of the network.
        saturates: whether the processor's kernels add pairs of products in 16 bits, which full bytes overflow.
    """

    def __init__(
        self, deployed: DeployedLayer, product: DeployedProduct, real: Tensor, context: TimestepContext, saturates: bool
    ) -> None:
        super().__init__(deployed, product, saturates)
        self.quantizer = GraphQuantizer(self.scale, context, BYTE_VALUES)
        self.multiply = Multiply(deployed, self.weight, real, self.summands)
        self.edges: list[int] = []
        if self.quantizer.zero_point_varies and self.multiply.geometry and any(self.multiply.geometry[1]):
            stride, (rows, columns), dilation = self.multiply.geometry
            self.edges = [columns, columns, rows, rows]  # padded zeros need the zero point of the step
            self.multiply.geometry = stride, (0, 0), dilation

    def forward(self, x: Tensor, steps: Tensor) -> Tensor:
        offset = self.quantizer.offset
        centred = x if offset is None else x - offset
        values, scale, shift = self.quantizer(F.pad(centred, self.edges) if self.edges else centred)
        y = self.added(self.multiply(values))
        y = y if shift is None else y - shift * self.sums
        y = y if scale is None else y * scale
        return y if offset is None else y + offset * self.of_ones(x)


def constant(value: Tensor | float) -> Node:
    return ops.constant(torch.as_tensor(value, dtype=torch.float32).detach().cpu().numpy())


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
    dims = weight.stored.dim()
    if weight.bits <= 4 and summands == 1:  # four bits in the file, bytes once it is loaded
        signed = ops.subtract(ops.convert(four_bits(weight.stored), "i8"), per_output(weight.shift, dims, np.int8))
    else:
        signed = ops.constant(weight.signed.numpy())
    if summands == 2:  # `split_in_two` in the graph: in the file the weight is whole
        whole = ops.convert(signed, "f32")
        low = ops.floor(ops.multiply(whole, constant(0.5)))
        signed = ops.convert(ops.concat([low, ops.subtract(whole, low)], 0), "i8")
    return ops.multiply(ops.convert(signed, "f32"), per_output(weight.scale.repeat(summands), dims, np.float32))


def float_weight(weight: SignedWeight | None, real: Tensor) -> Node:
    """Weight of a floating-point product; stored as integers if it is quantized."""
    if weight is None:
        return constant(real)
    stored = four_bits(weight.stored) if weight.bits <= 4 else ops.constant(weight.stored.numpy())
    centred = ops.subtract(ops.convert(stored, "f32"), per_output(weight.shift - weight.offset, real.dim(), np.float32))
    return ops.multiply(centred, per_output(weight.scale, real.dim(), np.float32))

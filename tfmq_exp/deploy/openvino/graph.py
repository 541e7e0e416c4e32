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

from tfmq_exp.deploy.activation_tables import BYTE_VALUES, ActivationScale, RuntimeScale, ScaleTable, varies
from tfmq_exp.deploy.layers import ByteProduct, DeployedLayer, DeployedProduct, Product
from tfmq_exp.deploy.weight_tables import SignedWeight, per_row

Node = Any  # openvino's nodes and outputs


class GraphOperation(nn.Module):
    """A module that becomes operations of OpenVINO; its own forward gives the shape of the output while it is traced."""

    def build(self, x: Node) -> Node:
        """Make the operations."""
        raise NotImplementedError


# quantizers ----------------------------------------------------------------------------------------------------------


class FakeQuantize(GraphOperation):
    """Gain * unit * clamp(round(u / unit), lowest, highest); unit and gain are those of a static table, else 1."""

    def __init__(self, table: ScaleTable, levels: int, static: bool) -> None:
        super().__init__()
        self.unit, self.gain = (float(table.scale[0]), float(table.gain[0])) if static else (1.0, 1.0)
        self.middle, self.codes, self.levels = int(table.zero_point.median()), table.num_codes, levels
        self.lowest = float(table.lowest.min()) - self.middle

    def forward(self, u: Tensor) -> Tensor:
        return u

    def build(self, x: Node) -> Node:
        lowest, highest, last = (self.unit * (self.lowest + n) for n in (0, self.codes - 1, self.levels - 1))
        x = ops.clamp(x, lowest, highest) if self.codes < self.levels else x
        return ops.fake_quantize(x, *map(constant, (lowest, last, self.gain * lowest, self.gain * last)), self.levels)


class Quantized(NamedTuple):
    """Input minus its offset, as scale * (values - shift); None is a scale of 1 and a shift of 0."""

    values: Tensor
    scale: Tensor | None
    shift: Tensor | None


class GraphQuantizer(nn.Module):
    """An activation quantizer up to its FakeQuantize.

    Args:
        scale: its quantization parameters.
        levels: of the FakeQuantize; the number of codes by default.
    """

    def __init__(self, scale: ActivationScale, levels: int | None = None) -> None:
        super().__init__()
        self.table = table = scale.table
        self.source = scale.source if isinstance(scale, RuntimeScale) else None
        self.static = self.source is None and not varies(*table)
        self.fake_quantize = FakeQuantize(table, levels or table.num_codes, self.static)
        unit, middle = self.fake_quantize.unit, self.fake_quantize.middle
        affine = self.source is not None and self.source.spec.scheme == "affine"
        self.zero_point_varies = affine or varies(table.zero_point)
        columns = {"scale": table.scale, "shift": table.zero_point - middle, "gain": table.gain, "offset": table.offset}
        columns |= {"lowest": table.lowest - middle, "highest": table.highest - middle}
        columns |= {"dead_zone": unit * table.dead_zone, "kept": 1 - table.pruned}
        # those that change with the step, each [steps]; `UNetWithStepInput` puts the present step's numbers into `present`
        self.columns = {name: column for name, column in columns.items() if varies(column)}
        self.present = {name: column[:1].clone() for name, column in columns.items()}

    def offset(self) -> Tensor | None:
        """Offset of the grid; None for 0."""
        return self.present["offset"] if bool(self.table.offset.any()) else None

    def forward(self, x: Tensor) -> Quantized:
        """Quantize `x` minus its offset."""
        table, now, scale, shift = self.table, self.present, None, None
        if self.source is not None:
            scale, zero_point = self.source(x)
            shift = zero_point - self.fake_quantize.middle if self.zero_point_varies else None
        elif not self.static:
            scale, shift = now["scale"], now["shift"] if self.zero_point_varies else None
        u = x if scale is None else x / scale
        if bool(table.pruned.any()):
            u = (u - torch.maximum(torch.minimum(u, now["dead_zone"]), -now["dead_zone"])) / now["kept"]
        u = u if shift is None else u + shift
        if varies(table.lowest, table.highest):
            u = torch.maximum(torch.minimum(u, now["highest"]), now["lowest"])
        if scale is not None and bool((table.gain != 1).any()):
            scale = scale * now["gain"]
        return Quantized(self.fake_quantize(u), scale, shift)


class RealQuantizer(nn.Module):
    """An activation quantizer in floating point."""

    def __init__(self, scale: ActivationScale) -> None:
        super().__init__()
        self.quantizer = GraphQuantizer(scale)

    def forward(self, x: Tensor) -> Tensor:
        offset = self.quantizer.offset()
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

    def __init__(self, deployed: DeployedLayer, product: DeployedProduct, real: Tensor) -> None:
        super().__init__()
        self.quantizer = nn.Identity() if product.input is None else RealQuantizer(product.input)
        self.multiply = Multiply(deployed, product.weight, real, None)

    def forward(self, x: Tensor, steps: Tensor) -> Tensor:
        return self.multiply(self.quantizer(x))


class Pad(GraphOperation):
    """Zeros above and below, left and right of an image."""

    def __init__(self, padding: tuple[int, int]) -> None:
        super().__init__()
        self.padding = padding

    def forward(self, x: Tensor) -> Tensor:
        rows, columns = self.padding
        return F.pad(x, [columns, columns, rows, rows])

    def build(self, x: Node) -> Node:
        edges = ops.constant([0, 0, *self.padding])
        return ops.pad(x, edges, edges, "constant", constant(0.0))


class IntegerProduct(ByteProduct):
    """A product that the plugin must execute in integers."""

    def __init__(self, deployed: DeployedLayer, product: DeployedProduct, real: Tensor, saturates: bool) -> None:
        super().__init__(deployed, product, saturates)
        self.quantizer = GraphQuantizer(self.scale, BYTE_VALUES)
        self.multiply, self.pad = Multiply(deployed, self.weight, real, self.summands), nn.Identity()
        if self.quantizer.zero_point_varies and self.multiply.geometry and any(self.multiply.geometry[1]):
            stride, padding, dilation = self.multiply.geometry
            self.pad = Pad(padding)  # zeros that need the zero point of the step
            self.multiply.geometry = stride, (0, 0), dilation

    def forward(self, x: Tensor, steps: Tensor) -> Tensor:
        offset = self.quantizer.offset()
        values, scale, shift = self.quantizer(self.pad(x if offset is None else x - offset))
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

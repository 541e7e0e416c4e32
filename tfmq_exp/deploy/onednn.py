"""oneDNN engine: integers on a CPU, layer by layer, by operators inside torch; no export, no further package.

Activations are rounded by the operations of the simulation, so the codes are equal bit by bit; only the product differs, which
is exact here. That makes it an independent check of other engines. The operators are private to torch: `available` tells
whether this build has them.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tfmq_exp.deploy.activation_tables import ScaleTable
from tfmq_exp.deploy.engine import write_manifest
from tfmq_exp.deploy.layer_report import DeployedLayer, DeployedProduct, deployed_layers, layer_report
from tfmq_exp.deploy.product_layers import ProductUNet
from tfmq_exp.deploy.weight_tables import per_row, split_in_two
from tfmq_exp.surgery.quantized_unet import QuantizedUNet

OPERATORS = ("qconv_prepack", "qconv2d_pointwise", "qlinear_prepack", "qlinear_pointwise")
POINTWISE = (1.0, 0, torch.float32, "none", [], "")  # output scale, zero point and type; no operation after the product


def available() -> bool:
    """Whether this build of torch has the operators."""
    return torch.backends.mkldnn.is_available() and all(hasattr(torch.ops.onednn, name) for name in OPERATORS)


class OneDNNProduct:
    """A product of a layer; see `Product`.

    Args:
        layer: a linear layer or convolution.
        product: its integers.
        saturates: whether the processor adds pairs of products in sixteen bits; weights above 64 are then split in two.
    """

    def __init__(self, layer: nn.Module, product: DeployedProduct, saturates: bool) -> None:
        assert product.weight is not None
        assert product.input is not None
        weight = product.weight
        self.layer, self.input = layer, product.input
        self.summands = weight.summands(saturates)
        self.rows = split_in_two(weight.extended.signed) if self.summands == 2 else weight.extended.signed
        self.scales = weight.extended.scale.repeat(self.summands)
        self.zeros = torch.zeros(len(self.rows), dtype=torch.int32)
        self.ones_scale = None if weight.exact else weight.scale * weight.offset
        self.sums, self.taps = weight.sums, weight.taps
        self.packed: dict[tuple[int, ...], Any] = {}

    def __call__(self, x: Tensor, steps: Tensor) -> Tensor:
        """Rows with equal quantization parameters are computed together."""
        table = self.input.of_rows(x, steps)
        kinds = torch.stack(table, dim=1).unique(dim=0, return_inverse=True)[1]
        y = by_kind(x, kinds, lambda part, rows: self.product(part, table.select(rows)))
        return y + per_row(table.offset, y.dim()) * self.of_ones(x) if bool(table.offset.any()) else y

    def product(self, x: Tensor, table: ScaleTable) -> Tensor:
        """Product of rows with equal quantization parameters, without the part of their offset."""
        lowest = table.lowest[:1]
        codes = (table.codes(x) - lowest).to(torch.uint8)
        y = self.multiply(codes, table.output_scale[:1], (table.zero_point[:1] - lowest).to(torch.int32))
        axis = 1 if isinstance(self.layer, nn.Conv2d) else -1
        total: Any = sum(y.chunk(self.summands, dim=axis))
        if self.ones_scale is None:
            return total
        y, inputs = total.split([len(self.ones_scale), 1], dim=axis)
        return y + inputs * (per_row(self.ones_scale, 3) if axis == 1 else self.ones_scale)

    def of_ones(self, x: Tensor) -> Tensor:
        """Product of an input of ones in the shape of `x`: sums of weights, less at borders, where padding is 0."""
        layer = self.layer
        if not isinstance(layer, nn.Conv2d):
            return self.sums
        return F.conv2d(x.new_ones(1, 1, *x.shape[2:]), self.taps, None, layer.stride, layer.padding, layer.dilation)

    def multiply(self, codes: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
        """Call the operators; a weight is packed once for every shape of input."""
        layer, shape, ops = self.layer, tuple(codes.shape), torch.ops.onednn
        if isinstance(layer, nn.Conv2d):
            geometry = (list(layer.stride), list(layer.padding), list(layer.dilation), layer.groups)
            if shape not in self.packed:
                # scale and zero point of a graph that knows them; those of the call are used
                self.packed[shape] = ops.qconv_prepack(self.rows, self.scales, 1.0, 0, *geometry, list(shape))
            weight = (self.packed[shape], self.scales, self.zeros, None)
            return ops.qconv2d_pointwise.tensor(codes, scale, zero_point, *weight, *geometry, *POINTWISE)
        if shape not in self.packed:
            self.packed[shape] = ops.qlinear_prepack(self.rows, list(shape))
        weight = (self.packed[shape], self.scales, self.zeros, None)
        return ops.qlinear_pointwise.tensor(codes, scale, zero_point, *weight, *POINTWISE)


def by_kind(x: Tensor, kinds: Tensor, compute: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Call `compute(rows of x, their indices)` for all rows of one kind at a time, and put the results in their places."""
    present = kinds.unique()
    if len(present) == 1:
        return compute(x, torch.arange(len(x)))
    parts = [(rows, compute(x[rows], rows)) for rows in (torch.nonzero(kinds == kind)[:, 0] for kind in present)]
    out = torch.empty(len(x), *parts[0][1].shape[1:])
    for rows, part in parts:
        out[rows] = part
    return out


def pairs_saturate() -> bool:
    """Whether oneDNN adds pairs of byte products in sixteen bits here, found by multiplying the largest bytes."""
    rows = torch.full((16, 64), 127, dtype=torch.int8)
    codes = torch.full((16, 64), 255, dtype=torch.uint8)
    weight = (
        torch.ops.onednn.qlinear_prepack(rows, [16, 64]),
        torch.ones(16),
        torch.zeros(16, dtype=torch.int32),
        None,
    )
    zero_point = torch.zeros(1, dtype=torch.int32)
    found = torch.ops.onednn.qlinear_pointwise.tensor(codes, torch.ones(1), zero_point, *weight, *POINTWISE)
    return bool((found - 255 * 127 * 64).abs().max() > 1)


def onednn_products(layer: DeployedLayer, saturates: bool) -> list[OneDNNProduct] | None:
    """Products of a layer that is executed in integers."""
    return [OneDNNProduct(layer.layer, product, saturates) for product in layer.products] if layer.integer else None


@dataclass(frozen=True)
class OneDNN:
    """`engine=onednn`.

    Raises:
        ValueError: a build of torch without the operators.
    """

    name = "onednn"

    def __post_init__(self) -> None:
        if not available():
            raise ValueError(f"torch {torch.__version__} has no oneDNN operators for integers ({', '.join(OPERATORS)})")

    @property
    def identity(self) -> Mapping[str, Any]:
        return {"name": self.name, "torch": torch.__version__.partition("+")[0]}

    def export(self, model: QuantizedUNet, example: Mapping[str, Tensor], folder: Path) -> None:
        """Write the layer report alone: the artefact is what the engine executes."""
        write_manifest(folder, {"layers": layer_report(model, deployed_layers(model))})

    def open(self, model: QuantizedUNet, folder: Path, *, batch: int) -> nn.Module:
        """Replace the integer layers of a copy; weights are packed at the first batch of each size."""
        saturates = pairs_saturate()
        return ProductUNet(model, lambda layer: onednn_products(layer, saturates), torch.device("cpu"))

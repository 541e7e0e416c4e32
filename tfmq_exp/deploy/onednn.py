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
from torch import Tensor, nn

from tfmq_exp.deploy.activation_tables import ScaleTable
from tfmq_exp.deploy.engine import write_manifest
from tfmq_exp.deploy.layers import (
    ByteProduct,
    DeployedLayer,
    DeployedProduct,
    ProductUNet,
    deployed_layers,
    layer_report,
)
from tfmq_exp.deploy.weight_tables import per_row, split_in_two
from tfmq_exp.surgery.quantized_network import QuantizedNetwork

OPERATORS = ("qconv_prepack", "qconv2d_pointwise", "qlinear_prepack", "qlinear_pointwise")
POINTWISE = (1.0, 0, torch.float32, "none", [], "")  # output scale, zero point and type; no operation after the product


def available() -> bool:
    """Whether this build of torch has the operators."""
    return torch.backends.mkldnn.is_available() and all(hasattr(torch.ops.onednn, name) for name in OPERATORS)


class OneDNNProduct(ByteProduct):
    """A product by the operators."""

    def __init__(self, deployed: DeployedLayer, product: DeployedProduct, saturates: bool) -> None:
        super().__init__(deployed, product, saturates)
        whole = self.weight.extended
        self.rows = split_in_two(whole.signed) if self.summands == 2 else whole.signed
        self.quantization = (whole.scale.repeat(self.summands), torch.zeros(len(self.rows), dtype=torch.int32))
        self.packed: dict[tuple[int, ...], Any] = {}

    def forward(self, x: Tensor, steps: Tensor) -> Tensor:
        """Rows with equal quantization parameters are computed together."""
        table = self.scale.of_rows(x, steps)
        kinds = torch.stack(table, dim=1).unique(dim=0, return_inverse=True)[1]
        y = by_kind(x, kinds, lambda part, rows: self.product(part, table.select(rows)))
        return y + per_row(table.offset, y.dim()) * self.of_ones(x) if bool(table.offset.any()) else y

    def product(self, x: Tensor, table: ScaleTable) -> Tensor:
        """Product of rows with equal quantization parameters, without the part of their offset; packs for each shape once."""
        lowest, ops = table.lowest[:1], torch.ops.onednn
        codes = (table.codes(x) - lowest).to(torch.uint8)
        operand = (codes, table.output_scale[:1], (table.zero_point[:1] - lowest).to(torch.int32))
        shape = list(codes.shape)
        pack, multiply, geometry = ops.qlinear_prepack, ops.qlinear_pointwise, list[Any]()
        further: list[Any] = [shape]
        if self.geometry:
            pack, multiply, geometry = ops.qconv_prepack, ops.qconv2d_pointwise, [*map(list, self.geometry), 1]
            # scale and zero point of a graph that knows them; those of the call are used
            further = [self.quantization[0], 1.0, 0, *geometry, shape]
        if codes.shape not in self.packed:
            self.packed[codes.shape] = pack(self.rows, *further)
        weight = (self.packed[codes.shape], *self.quantization, None)
        return self.added(multiply.tensor(*operand, *weight, *geometry, *POINTWISE))


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
    ops, zeros = torch.ops.onednn, torch.zeros(16, dtype=torch.int32)
    packed = ops.qlinear_prepack(torch.full((16, 64), 127, dtype=torch.int8), [16, 64])
    codes = (torch.full((16, 64), 255, dtype=torch.uint8), torch.ones(1), zeros[:1])
    found = ops.qlinear_pointwise.tensor(*codes, packed, torch.ones(16), zeros, None, *POINTWISE)
    return bool((found - 255 * 127 * 64).abs().max() > 1)


def onednn_products(layer: DeployedLayer, saturates: bool) -> list[OneDNNProduct]:
    """Products of a layer; none unless it is executed in integers."""
    return [OneDNNProduct(layer, product, saturates) for product in layer.products] if layer.integer else []


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

    def export(self, model: QuantizedNetwork, example: Mapping[str, Tensor], folder: Path) -> None:
        """Write the layer report alone: the artefact is what the engine executes."""
        write_manifest(folder, {"layers": layer_report(model, deployed_layers(model))})

    def open(self, model: QuantizedNetwork, folder: Path, *, batch: int) -> nn.Module:
        """Replace the integer layers of a copy; weights are packed at the first batch of each size."""
        saturates = pairs_saturate()
        return ProductUNet(model, lambda layer: onednn_products(layer, saturates), torch.device("cpu"))

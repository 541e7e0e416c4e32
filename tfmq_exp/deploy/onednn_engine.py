"""Integers on a CPU by the oneDNN operators inside torch, layer by layer: no export, no further package.

Activations are rounded by the operations that the simulation has, so codes are those of the simulation, bit by bit; what
differs is the product alone, which is exact here. That makes it a second opinion on other engines too. The operators are private
to torch: `available` says whether this build has them.
"""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tfmq_exp.deploy.activations import StepGrid
from tfmq_exp.deploy.engine import Prediction, write_manifest
from tfmq_exp.deploy.sites import Piece, Site, examine, table
from tfmq_exp.deploy.weights import PAIR_SAFE, SignedWeight, halves, per_row
from tfmq_exp.quant.layers import QuantLayer
from tfmq_exp.quant.timestep_context import TimestepContext
from tfmq_exp.surgery.quantized_unet import QuantizedUNet

OPERATORS = ("qconv_prepack", "qconv2d_pointwise", "qlinear_prepack", "qlinear_pointwise")


def available() -> bool:
    """Whether this build of torch has the operators."""
    return torch.backends.mkldnn.is_available() and all(hasattr(torch.ops.onednn, name) for name in OPERATORS)


class IntegerProduct(nn.Module):
    """One group of input channels times its part of the weight, in integers, without bias.

    Args:
        layer: what it belongs to.
        piece: its integers.
        context: of the model: at which step every row is.
        pairs_saturate: the processor adds pairs of products in sixteen bits; weights above 64 are multiplied in halves.
    """

    def __init__(self, layer: QuantLayer, piece: Piece, context: TimestepContext, pairs_saturate: bool) -> None:
        super().__init__()
        assert piece.weight is not None
        assert piece.grid is not None
        weight: SignedWeight = piece.weight
        self.copies = 2 if pairs_saturate and weight.reach > PAIR_SAFE else 1
        rows = halves(weight.signed) if self.copies == 2 else weight.signed
        scales, self.sizes = [weight.scale] * self.copies, [len(weight.scale)] * self.copies
        self.left_over: Tensor | None = None
        if not weight.exact:
            rows, scales = torch.cat([rows, torch.ones_like(rows[:1])]), [*scales, torch.ones(1)]
            self.sizes, self.left_over = [*self.sizes, 1], weight.scale * weight.offset
        self.rows, self.scales = rows, torch.cat(scales)
        self.zeros = torch.zeros(len(rows), dtype=torch.int32)
        self.grid, self.context, self.layer = piece.grid, context, (layer,)
        self.shared: StepGrid | None = None  # one entry for whatever rows
        if isinstance(piece.grid, StepGrid) and piece.grid.static:
            self.shared = piece.grid.taken(torch.tensor([0]))
        self.sums, self.taps = weight.sums, weight.taps
        self.packed: dict[tuple[int, ...], Any] = {}

    def forward(self, x: Tensor) -> Tensor:
        """As the simulated product; rows of a batch may be on different grids, equal ones go through together."""
        if self.shared is not None:
            grid, y = self.shared, self.product(x, self.shared)
        else:
            grid = self.grid.of_rows(x, self.context.index)
            kinds = torch.stack(grid.parts, dim=1).unique(dim=0, return_inverse=True)[1]
            y = by_rows(x, kinds, lambda part, rows: self.product(part, grid.taken(rows)))
        return y + per_row(grid.offset, y.dim()) * self.of_ones(x) if bool(grid.offset.any()) else y

    def product(self, x: Tensor, grid: StepGrid) -> Tensor:
        """All rows on one grid, but for what its offset adds."""
        lowest = grid.lowest[:1]
        codes = (grid.codes(x) - lowest).to(torch.uint8)
        y = self.multiplied(codes, grid.unit[:1], (grid.zero_point[:1] - lowest).to(torch.int32))
        axis = 1 if isinstance(self.layer[0], nn.Conv2d) else -1
        parts = y.split(self.sizes, dim=axis)
        total = parts[0] if self.copies == 1 else parts[0] + parts[1]
        if self.left_over is None:
            return total
        return total + parts[-1] * (self.left_over.reshape(-1, 1, 1) if axis == 1 else self.left_over)

    def of_ones(self, x: Tensor) -> Tensor:
        """What ones in the shape of `x` become: the sums of weights, less at borders, where padding is 0."""
        layer = self.layer[0]
        if not isinstance(layer, nn.Conv2d):
            return self.sums
        return F.conv2d(x.new_ones(1, 1, *x.shape[2:]), self.taps, None, layer.stride, layer.padding, layer.dilation)

    def multiplied(self, codes: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
        """The operators themselves; a weight is packed once for every shape of input."""
        layer, shape, ops = self.layer[0], tuple(codes.shape), torch.ops.onednn
        tail = (1.0, 0, torch.float32, "none", [], "")
        if isinstance(layer, nn.Conv2d):
            geometry = (list(layer.stride), list(layer.padding), list(layer.dilation), layer.groups)
            if shape not in self.packed:
                # the scale and zero point given here are those of a graph that knows them; the call's own count
                self.packed[shape] = ops.qconv_prepack(self.rows, self.scales, 1.0, 0, *geometry, list(shape))
            packed = self.packed[shape]
            return ops.qconv2d_pointwise.tensor(
                codes, scale, zero_point, packed, self.scales, self.zeros, None, *geometry, *tail
            )
        if shape not in self.packed:
            self.packed[shape] = ops.qlinear_prepack(self.rows, list(shape))
        return ops.qlinear_pointwise.tensor(
            codes, scale, zero_point, self.packed[shape], self.scales, self.zeros, None, *tail
        )


def by_rows(x: Tensor, kinds: Tensor, work: Any) -> Tensor:
    """`work(rows of x, their indices)` for all rows of one kind at a time, put back in their places."""
    present = kinds.unique()
    if len(present) == 1:
        return work(x, torch.arange(len(x)))
    parts = [(rows, work(x[rows], rows)) for rows in (torch.nonzero(kinds == kind)[:, 0] for kind in present)]
    out = torch.empty(len(x), *parts[0][1].shape[1:])
    for rows, part in parts:
        out[rows] = part
    return out


class IntegerLayer(nn.Module):
    """A layer with all its products in integers, its bias and its output quantizer."""

    def __init__(self, site: Site, context: TimestepContext, pairs_saturate: bool) -> None:
        super().__init__()
        layer = site.layer
        self.products = nn.ModuleList(IntegerProduct(layer, piece, context, pairs_saturate) for piece in site.pieces)
        self.sizes = [piece.channels for piece in site.pieces]
        self.bias: Any = layer.bias
        self.output_quantizer, self.convolution = layer.output_quantizer, isinstance(layer, nn.Conv2d)

    def forward(self, input: Tensor) -> Tensor:
        """As the simulated layer."""
        pieces = input.split(self.sizes, dim=1) if len(self.sizes) > 1 else (input,)
        y = sum(product(piece) for product, piece in zip(self.products, pieces, strict=True))
        if self.bias is not None:
            y = y + (self.bias.reshape(-1, 1, 1) if self.convolution else self.bias)
        return self.output_quantizer(y)


class OneDNNDenoiser(nn.Module):
    """The quantized model with its integer layers in place of the simulated ones."""

    def __init__(self, model: QuantizedUNet, sites: Sequence[Site]) -> None:
        super().__init__()
        self.model = model
        for site in sites:
            if site.integer:
                model.unet.set_submodule(site.name, IntegerLayer(site, model.context, saturating()))

    def forward(self, sample: Tensor, timestep: Tensor, **conditions: Tensor) -> Prediction:
        """As the simulated model; wherever the tensors are, it computes on the CPU."""
        given = {name: value.cpu() for name, value in conditions.items()}
        return Prediction(self.model(sample.cpu(), torch.as_tensor(timestep).cpu(), **given).sample.to(sample))


def saturating() -> bool:
    """Multiply the largest bytes and look, as `pairs.pairs_saturate` does with OpenVINO."""
    rows = torch.full((16, 64), 127, dtype=torch.int8)
    codes = torch.full((16, 64), 255, dtype=torch.uint8)
    one, zero = torch.ones(1), torch.zeros(1, dtype=torch.int32)
    packed = torch.ops.onednn.qlinear_prepack(rows, [16, 64])
    found = torch.ops.onednn.qlinear_pointwise.tensor(
        codes, one, zero, packed, torch.ones(16), torch.zeros(16, dtype=torch.int32), None,
        1.0, 0, torch.float32, "none", [], "",
    )  # fmt: skip
    return bool((found - 255 * 127 * 64).abs().max() > 1)


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
        """The version of torch."""
        return {"name": self.name, "torch": torch.__version__.partition("+")[0]}

    def export(self, model: QuantizedUNet, example: Mapping[str, Tensor], folder: Path) -> None:
        """The table alone: the artefact is what it runs."""
        write_manifest(folder, {"sites": table(model, examine(model))})

    def open(self, model: QuantizedUNet, folder: Path, *, batch: int) -> nn.Module:
        """A copy of the model with integer layers; weights are packed at the first batch of each size."""
        own = copy.deepcopy(model).cpu()
        return OneDNNDenoiser(own, examine(own))

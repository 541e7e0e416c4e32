"""Integers on a CPU by the oneDNN operators inside torch, layer by layer: no export, no further package.

Activations are rounded by the simulation's own operations, so its codes are those of the simulation, bit by bit; what differs
is the product alone, which is exact here. That makes it a second opinion on other engines too. The operators are private
to torch: `available` says whether this build has them.
"""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tfmq_exp.deploy.engine import Prediction, write_manifest
from tfmq_exp.deploy.sites import Piece, Site, examine, table
from tfmq_exp.deploy.weights import PAIR_SAFE, SignedWeight, halves
from tfmq_exp.quant.functional import quantize
from tfmq_exp.quant.layers import QuantLayer
from tfmq_exp.quant.quantizers.split import SplitQuantizer
from tfmq_exp.quant.quantizers.step_switch import StepSwitch
from tfmq_exp.quant.spec import QParams, QuantSpec
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
        quantizer: of its input.
        pairs_saturate: the processor adds pairs of products in sixteen bits; weights above 64 are multiplied in halves.
    """

    def __init__(self, layer: QuantLayer, piece: Piece, quantizer: nn.Module, pairs_saturate: bool) -> None:
        super().__init__()
        assert piece.weight is not None
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
        self.quantizer, self.layer = quantizer, (layer,)
        self.packed: dict[tuple[int, ...], Any] = {}

    def forward(self, x: Tensor) -> Tensor:
        """As the simulated product; rows of a batch may be on different grids, equal ones go through together."""
        quantizer = self.quantizer
        if isinstance(quantizer, StepSwitch):
            chosen = quantizer.at[quantizer.clock.index]
            return by_rows(x, chosen, lambda part, i: self.on_grid(part, quantizer.choices[int(chosen[i[0]])], i))
        return self.on_grid(x, quantizer, torch.arange(len(x)))

    def on_grid(self, x: Tensor, quantizer: Any, rows: Tensor) -> Tensor:
        """Rows of the batch that one quantizer acts on."""
        spec = quantizer.spec
        scale, zero_point = quantizer.source(x)
        if scale.numel() == 1:
            return self.product(x, QParams(scale, zero_point), spec)
        if len(scale) != len(x):  # a table knows the steps of the whole batch
            scale, zero_point = scale[rows], zero_point[rows]
        kinds = torch.stack([scale.flatten(), zero_point.flatten()], dim=1).unique(dim=0, return_inverse=True)[1]
        return by_rows(x, kinds, lambda part, i: self.product(part, QParams(scale[i[:1]], zero_point[i[:1]]), spec))

    def product(self, x: Tensor, q: QParams, spec: QuantSpec) -> Tensor:
        """All rows on one grid."""
        codes = (quantize(x, q, spec) - spec.qmin).to(torch.uint8)
        scale = q.scale.reshape(1)
        zero_point = (q.zero_point.reshape(1) - spec.qmin).to(torch.int32)
        y = self.multiplied(codes, scale, zero_point)
        axis = 1 if isinstance(self.layer[0], nn.Conv2d) else -1
        parts = y.split(self.sizes, dim=axis)
        total = parts[0] if self.copies == 1 else parts[0] + parts[1]
        if self.left_over is None:
            return total
        return total + parts[-1] * (self.left_over.reshape(-1, 1, 1) if axis == 1 else self.left_over)

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
    parts = [(rows, work(x[rows], rows)) for rows in (torch.nonzero(kinds == kind)[:, 0] for kind in kinds.unique())]
    if len(parts) == 1:
        return parts[0][1]
    out = torch.empty(len(x), *parts[0][1].shape[1:])
    for rows, part in parts:
        out[rows] = part
    return out


class IntegerLayer(nn.Module):
    """A layer with all its products in integers, its bias and its output quantizer."""

    def __init__(self, site: Site, pairs_saturate: bool) -> None:
        super().__init__()
        layer, quantizer = site.layer, site.layer.input_quantizer
        parts = list(quantizer.parts) if isinstance(quantizer, SplitQuantizer) else [quantizer]
        self.products = nn.ModuleList(
            IntegerProduct(layer, piece, part, pairs_saturate) for piece, part in zip(site.pieces, parts, strict=True)
        )
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
                model.unet.set_submodule(site.name, IntegerLayer(site, saturating()))

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

    def export(self, model: QuantizedUNet, example: Mapping[str, Tensor], folder: Path) -> Sequence[Mapping[str, Any]]:
        """The table alone: the artefact is what it runs."""
        rows = table(model, examine(model))
        write_manifest(folder, {"sites": rows})
        return rows

    def open(self, model: QuantizedUNet, folder: Path, *, batch: int) -> nn.Module:
        """A copy of the model with integer layers; weights are packed at the first batch of each size."""
        own = copy.deepcopy(model)
        own.integers = model.integers
        return OneDNNDenoiser(own, examine(own))

"""Every layer and what an engine makes of it: in integers, or in floating point and why."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from tfmq_exp.denoisers.unet import LAYERS
from tfmq_exp.deploy.activations import Grid, grid_of
from tfmq_exp.deploy.weights import DoesNotFit, SignedWeight, signed_weight
from tfmq_exp.quant.layers import QuantLayer
from tfmq_exp.quant.quantizers.split import SplitQuantizer
from tfmq_exp.surgery.quantized_unet import QuantizedUNet


@dataclass(frozen=True)
class Piece:
    """A product of one group of input channels with its part of the weight; most sites have one.

    Args:
        channels: of the input.
        weight: integers, or None where the weight stays float.
        grid: of the input, or None where it stays float, or where none of the records here says what its quantizer does.
    """

    channels: int
    weight: SignedWeight | None
    grid: Grid | None


@dataclass(frozen=True)
class Site:
    """One layer.

    Args:
        name: in the network.
        layer: the simulated twin.
        pieces: by groups of input channels.
        output: grid that the layer's output is put on afterwards, in floating point.
        why: why it is executed in floating point; empty where it is in integers.
    """

    name: str
    layer: QuantLayer
    pieces: tuple[Piece, ...]
    output: Grid | None
    why: str

    @property
    def integer(self) -> bool:
        """Whether both operands are integers when they are multiplied."""
        return not self.why

    def line(self) -> Mapping[str, str | int]:
        """A row of the table of sites."""
        stored = sorted({piece.weight.bits if piece.weight else 32 for piece in self.pieces})
        ones = any(piece.weight and not piece.weight.exact for piece in self.pieces)
        return {
            "site": self.name,
            "executed": "int8" if self.integer else "float",
            "weight_bits": "+".join(map(str, stored)),
            "products": len(self.pieces),
            "form": "extra channel of ones" if ones and self.integer else "",
            "why": self.why,
        }


def examine(model: QuantizedUNet) -> tuple[Site, ...]:
    """Every quantized layer as an engine can have it. Weights must be frozen, sources merged."""
    return tuple(site_of(model, name) for name in model.plan.sites)


def site_of(model: QuantizedUNet, name: str) -> Site:
    """One quantized layer."""
    layer, steps = model.layer(name), model.context.num_steps
    reasons: list[str] = []
    weights = weights_of(model, name, reasons)
    grids = grids_of(layer.input_quantizer, steps, reasons)
    if isinstance(layer, nn.Conv2d) and (layer.groups != 1 or layer.padding_mode != "zeros"):
        reasons.append(f"a convolution with {layer.groups} groups and {layer.padding_mode} padding")
    count = model.plan.sites[name].split
    sizes = (count, layer.weight.shape[1] - count) if count else (layer.weight.shape[1],)
    alone = (weights * len(sizes) if len(weights) == 1 else weights, grids * len(sizes) if len(grids) == 1 else grids)
    pieces = tuple(Piece(size, weight, grid) for size, weight, grid in zip(sizes, *alone, strict=True))
    output = None if isinstance(layer.output_quantizer, nn.Identity) else grid_of(layer.output_quantizer, steps)
    return Site(name, layer, pieces, output, "; ".join(dict.fromkeys(reasons)))


def grids_of(quantizer: nn.Module, steps: int, reasons: list[str]) -> list[Grid | None]:
    """The grids of an input, by groups of channels; whatever keeps one from being bytes is noted as a reason."""
    found: list[Grid | None] = []
    for part in quantizer.parts if isinstance(quantizer, SplitQuantizer) else [quantizer]:
        grid = None
        if isinstance(part, nn.Identity):
            reasons.append("its input is not quantized")
        else:
            try:
                grid = grid_of(part, steps)
                grid.check_bytes()
            except DoesNotFit as error:
                reasons.append(str(error))
        found.append(grid)
    return found


def weights_of(model: QuantizedUNet, name: str, reasons: list[str]) -> list[SignedWeight | None]:
    """The parts of a layer's weight; None for one that is not integer or does not fit, with the reason noted."""
    if name not in model.integers:
        reasons.append("its weight is not quantized")
        return [None]
    found: list[SignedWeight | None] = []
    for part in model.integers[name]:
        try:
            found.append(signed_weight(part))
        except DoesNotFit as error:
            reasons.append(str(error))
            found.append(None)
    return found


def table(model: QuantizedUNet, sites: Sequence[Site]) -> list[Mapping[str, str | int]]:
    """Rows for all layers with weights, those that nobody quantizes included; networks inside quantizers are no layers."""
    quantized = {site.name: site.line() for site in sites}
    within = tuple(f"{quantizer}." for quantizer in model.activation_quantizers())
    rows: list[Mapping[str, str | int]] = []
    for name, module in model.unet.named_modules():
        if isinstance(module, LAYERS) and not name.startswith(within):
            plain = {"executed": "float", "weight_bits": "32", "products": 1, "form": "", "why": "it is not quantized"}
            rows.append(quantized.get(name, {"site": name, **plain}))
    return rows

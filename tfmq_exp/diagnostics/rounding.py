"""What learning did to the rounding of weights: how many left the nearest integer, how far, and at what cost."""

from typing import Any

import torch
from torch import Tensor, nn

from tfmq_exp.denoisers.structure import UNetStructure
from tfmq_exp.quant.functional import dequantize, quantize
from tfmq_exp.surgery.quantized_unet import QuantizedUNet

Row = dict[str, Any]


@torch.no_grad()
def rounding_changes(model: QuantizedUNet, float_unet: nn.Module, structure: UNetStructure) -> list[Row]:
    """For every integer weight in execution order, beside the nearest integers on the same grid.

    Returns:
        rows with `changed`, the share of weights with another integer than the nearest; `up`, the share that went up;
        `largest_steps`, the largest distance in steps of the grid (AdaRound chooses between two neighbours: at most 1);
        `relative_mse` of the weight, over its mean square, `nearest_relative_mse` likewise, and their quotient `mse_ratio`
        (1 where both are 0).
    """
    return [
        {"layer": site, "role": structure.sites[site].role.value, **_compared(model, float_unet, site)}
        for block in structure.blocks
        for site in block.sites
        if site in model.integers
    ]


def _compared(model: QuantizedUNet, float_unet: nn.Module, site: str) -> Row:
    """One layer, whose weight may be in parts with grids of their own."""
    weight = float_unet.get_submodule(site).get_parameter("weight").detach()
    parts = model.integers[site]
    total = {"changed": 0, "up": 0}
    largest, error, nearest_error = 0, 0.0, 0.0
    for part, piece in zip(parts, weight.split([part.codes.shape[1] for part in parts], dim=1), strict=True):
        qparams = type(part.qparams)(*(value.to(piece.device) for value in part.qparams))
        nearest = quantize(piece, qparams, part.spec)
        chosen = part.codes.to(nearest) + part.spec.qmin
        steps = chosen - nearest
        total["changed"] += int((steps != 0).sum())
        total["up"] += int((steps > 0).sum())
        largest = max(largest, int(steps.abs().max()))
        error += _squared(dequantize(chosen, qparams), piece)
        nearest_error += _squared(dequantize(nearest, qparams), piece)
    power = float(weight.double().square().sum()) or 1.0  # a weight of zeros has no error either
    return {
        "bits": parts[0].spec.bits,
        "weights": weight.numel(),
        **{name: count / weight.numel() for name, count in total.items()},
        "largest_steps": largest,
        "relative_mse": error / power,
        "nearest_relative_mse": nearest_error / power,
        "mse_ratio": error / nearest_error if nearest_error else 1.0,
    }


def _squared(value: Tensor, wanted: Tensor) -> float:
    return float((value.double() - wanted.double()).square().sum())

"""Effect of learning on the rounding of weights: how many left the nearest integer, how far, and at what cost."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from tfmq_exp.denoisers.structure import NetworkStructure
from tfmq_exp.diagnostics.rows import Row
from tfmq_exp.quant.functional import dequantize, quantize
from tfmq_exp.quant.layers import QuantizedWeight
from tfmq_exp.surgery.quantized_network import QuantizedNetwork


@torch.no_grad()
def rounding_changes(model: QuantizedNetwork, float_network: nn.Module, structure: NetworkStructure) -> list[Row]:
    """Compare every integer weight, in execution order, with the nearest integers on the same grid.

    Returns:
        rows with `changed`, the share of weights with another integer than the nearest; `up`, the share that went up;
        `largest_steps`, the largest distance in steps of the grid (AdaRound chooses between two neighbours: at most 1);
        `relative_mse` of the weight, over its mean square, `nearest_relative_mse` likewise, and their quotient `mse_ratio`
        (1 where both are 0).
    """
    integers = model.integers
    return [
        {"layer": layer, "role": structure.layers[layer].role.value, **_compared(integers[layer], float_network, layer)}
        for block in structure.blocks
        for layer in block.layers
        if layer in integers
    ]


def _compared(operands: Sequence[QuantizedWeight], float_network: nn.Module, layer: str) -> Row:
    """One layer, whose weight may be split along the input channels into operands with grids of their own."""
    weight = float_network.get_parameter(f"{layer}.weight").detach()
    changed = up = largest = 0
    error = nearest_error = 0.0
    for operand, part in zip(operands, weight.split([q.codes.shape[1] for q in operands], dim=1), strict=True):
        qparams = type(operand.qparams)(*(value.to(part.device) for value in operand.qparams))
        nearest = quantize(part, qparams, operand.spec)
        chosen = operand.codes.to(nearest) + operand.spec.qmin
        steps = chosen - nearest
        changed, up = changed + int((steps != 0).sum()), up + int((steps > 0).sum())
        largest = max(largest, int(steps.abs().max()))
        error += _squared_error(dequantize(chosen, qparams), part)
        nearest_error += _squared_error(dequantize(nearest, qparams), part)
    count, power = weight.numel(), float(weight.double().square().sum()) or 1.0  # zeros have no error either
    return {
        **{"bits": operands[0].spec.bits, "weights": count},
        **{"changed": changed / count, "up": up / count, "largest_steps": largest},
        **{"relative_mse": error / power, "nearest_relative_mse": nearest_error / power},
        "mse_ratio": error / nearest_error if nearest_error else 1.0,
    }


def _squared_error(value: Tensor, exact: Tensor) -> float:
    return float((value.double() - exact.double()).square().sum())

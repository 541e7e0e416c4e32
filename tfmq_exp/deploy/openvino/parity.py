"""Parity check of an exported model and its simulation, layer by layer, on the inputs that reach the exported layer.

Over the whole network they cannot agree closely: a code that is rounded the other way at a tie changes everything after it, as
another order of summation does in the simulation.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import openvino as ov
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from tfmq_exp.deploy.activation_tables import ActivationScale
from tfmq_exp.deploy.layers import DeployedLayer, deployed_layer
from tfmq_exp.deploy.openvino.export import convert
from tfmq_exp.deploy.openvino.runtime import compile_settings
from tfmq_exp.deploy.weight_tables import per_row
from tfmq_exp.surgery.quantized_network import QuantizedNetwork

TOLERANCE = 1e-5  # of the largest output
ROUNDING_ERROR = 2.0**-21  # of u, in float32 and by another order of the same operations


@dataclass(frozen=True)
class LayerParity:
    """Differences of one layer at one sampling step.

    Args:
        layer, step: which.
        error: largest difference, over the largest output.
        outputs: number of outputs.
        beyond: number of outputs that differ by more than the tolerance.
        unexplained: number of those that no input or output at a tie between two codes explains.
    """

    layer: str
    step: int
    error: float
    outputs: int
    beyond: int
    unexplained: int


def compare_layers(
    model: QuantizedNetwork,
    inputs: Mapping[str, Tensor],
    *,
    steps: Sequence[int],
    layers: Sequence[str],
    split_int8_weights: bool,
    threads: int | None = None,
) -> list[LayerParity]:
    """Compare layers of a model, converted as `export` does it, with those of the simulation.

    Args:
        model: the simulation.
        inputs: keyword arguments of a forward pass; the timestep is ignored.
        steps: indices of sampling steps.
        layers: names of layers.
        split_int8_weights: see `export`.
        threads: None leaves the number to OpenVINO.
    """
    converted = convert(model, inputs, split_int8_weights, layers).model
    given = {name: value.numpy() for name, value in inputs.items() if name != "timestep"}
    shapes: dict[Any, list[int]] = {name: list(value.shape) for name, value in given.items()}
    converted.reshape({**shapes, "step": []})
    compiled = ov.Core().compile_model(converted, "CPU", compile_settings(threads, "f32"))
    deployed, found = [deployed_layer(model, layer) for layer in layers], list[LayerParity]()
    for step in steps:
        _, *out = compiled({**given, "step": torch.tensor(step).numpy()}).to_tuple()
        seen = list(map(torch.from_numpy, out))
        t = torch.full((len(inputs["sample"]),), model.context.timesteps[step])
        with model.context.at(t), torch.no_grad():
            pairs = zip(deployed, seen[::2], seen[1::2], strict=True)
            found += [compare_layer(layer, model.context.index, x, y) for layer, x, y in pairs]
    return found


def compare_layer(deployed: DeployedLayer, steps: Int[Tensor, "batch"], x: Tensor, y: Tensor) -> LayerParity:
    """Compare the output `y` of a deployed layer with the simulation's for the same input `x`, the context set to `steps`."""
    simulated = deployed.layer(x)
    error = (y - simulated).abs() / simulated.abs().max().clamp(min=torch.finfo(torch.float32).tiny)
    beyond = error > TOLERANCE
    unexplained = beyond & ~affected_by_ties(deployed, steps, x)
    counts = (error.numel(), int(beyond.sum()), int(unexplained.sum()))
    return LayerParity(deployed.name, int(steps[0]), float(error.max()), *counts)


def affected_by_ties(
    deployed: DeployedLayer, steps: Int[Tensor, "batch"], x: Float[Tensor, "batch ..."]
) -> Bool[Tensor, "batch ..."]:
    """Outputs that depend on an input at a tie, or that are at a tie themselves."""
    layer, products = deployed.layer, deployed.products
    parts = x.split([product.channels for product in products], dim=deployed.axis)
    ties = [at_tie(product.input, part, steps) for product, part in zip(products, parts, strict=True)]
    near = torch.cat(ties, dim=deployed.axis).float()
    if isinstance(layer, nn.Conv2d):
        ones = torch.ones(1, near.shape[1], *layer.kernel_size)
        reached = F.conv2d(near, ones, None, layer.stride, layer.padding, layer.dilation) > 0
    else:
        reached = near.any(-1, keepdim=True)
    quantizer, layer.output_quantizer = layer.output_quantizer, nn.Identity()
    try:
        return reached | at_tie(deployed.output, layer(x), steps)
    finally:
        layer.output_quantizer = quantizer


def at_tie(scale: ActivationScale | None, x: Tensor, steps: Int[Tensor, "batch"]) -> Bool[Tensor, "batch ..."]:
    """Numbers so near the middle between two codes that rounding errors decide."""
    if scale is None:
        return torch.zeros_like(x, dtype=torch.bool)
    table = scale.of_rows(x, steps)
    u = table.scaled(x.double())
    unit, zero_point, offset = (per_row(column, x.dim()) for column in (table.scale, table.zero_point, table.offset))
    width, kept = per_row(table.highest - table.lowest + 1, x.dim()), per_row(1 - table.pruned, x.dim())
    size = torch.stack(torch.broadcast_tensors((x.abs() + offset.abs()) / unit, (u + zero_point).abs(), width)).amax(0)
    return (u - u.floor() - 0.5).abs() < ROUNDING_ERROR * size / kept

"""A deployed model beside its simulation, layer by layer: both are given what reached the layer in the deployed one.

From end to end they cannot agree closely: a code that falls on the other side of a tie moves everything after it, as another
order of summation in the simulation would.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import openvino as ov
import openvino.opset13 as ops
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from tfmq_exp.deploy.convert import Converted
from tfmq_exp.deploy.loader import settings
from tfmq_exp.quant.layers import QuantLayer
from tfmq_exp.quant.quantizers.affine import AffineQuantizer
from tfmq_exp.quant.quantizers.split import SplitQuantizer
from tfmq_exp.quant.quantizers.step_switch import StepSwitch
from tfmq_exp.surgery.quantized_unet import QuantizedUNet

TOLERANCE = 1e-5  # of the largest output
STEP_ERROR = 2.0**-21  # of a number of steps, in float32 and by another order of the same operations


@dataclass(frozen=True)
class SiteAgreement:
    """One layer at one step.

    Args:
        error: largest difference, in units of the largest output.
        outputs: how many numbers were compared.
        beyond: how many differ by more than the tolerance.
        unexplained: those of them that no input or output at a tie between two codes explains.
    """

    site: str
    step: int
    error: float
    outputs: int
    beyond: int
    unexplained: int


def agreement(
    found: Converted,
    model: QuantizedUNet,
    inputs: Mapping[str, Tensor],
    *,
    steps: Sequence[int],
    sites: Sequence[str],
    threads: int | None = None,
) -> list[SiteAgreement]:
    """Compare layers of a converted model with those of the simulation.

    Args:
        found: in memory as it was converted.
        model: the simulation.
        inputs: keyword arguments of a forward pass; their timestep is not read.
        steps: indices of sampling steps.
        sites: names of layers.
        threads: None leaves them to OpenVINO.
    """
    taps = [port for site in sites for port in found.taps[site]]
    results = [*found.model.get_results(), *map(ops.result, taps)]
    tapped: Any = ov.Model(results, found.model.get_parameters())  # pyright: ignore[reportGeneralTypeIssues]
    given = {name: value.numpy() for name, value in inputs.items() if name != "timestep"}
    shapes: dict[Any, list[int]] = {name: list(value.shape) for name, value in given.items()}
    tapped.reshape({**shapes, "step": []})
    compiled = ov.Core().compile_model(tapped, "CPU", settings(threads, "f32"))
    rows: list[SiteAgreement] = []
    for step in steps:
        out = list(compiled({**given, "step": torch.tensor(step).numpy()}).values())
        seen = [torch.from_numpy(value) for value in out[-len(taps) :]]
        t = torch.full((len(inputs["sample"]),), model.clock.timesteps[step])
        with model.clock.at(t), torch.no_grad():
            rows += [
                compared(site, step, model.layer(site), seen[2 * i], seen[2 * i + 1]) for i, site in enumerate(sites)
            ]
    return rows


def compared(site: str, step: int, layer: QuantLayer, x: Tensor, y: Tensor) -> SiteAgreement:
    """One layer, with the clock set."""
    wanted = layer(x)
    error = (y - wanted).abs() / wanted.abs().max().clamp(min=torch.finfo(torch.float32).tiny)
    beyond = error > TOLERANCE
    unexplained = beyond & ~touched(layer, x)
    return SiteAgreement(site, step, float(error.max()), error.numel(), int(beyond.sum()), int(unexplained.sum()))


def touched(layer: QuantLayer, x: Float[Tensor, "batch ..."]) -> Bool[Tensor, "batch ..."]:
    """Outputs that some input at a tie reaches, or that are at a tie themselves."""
    near = at_tie(layer.input_quantizer, x).float()
    if isinstance(layer, nn.Conv2d):
        ones = torch.ones(1, near.shape[1], *layer.kernel_size)
        reached = F.conv2d(near, ones, None, layer.stride, layer.padding, layer.dilation) > 0
    else:
        reached = near.any(-1, keepdim=True)
    quantizer, layer.output_quantizer = layer.output_quantizer, nn.Identity()
    try:
        return reached | at_tie(quantizer, layer(x))
    finally:
        layer.output_quantizer = quantizer


def at_tie(quantizer: nn.Module, x: Tensor) -> Bool[Tensor, "batch ..."]:
    """Numbers so near the middle between two codes that rounding errors decide."""
    if isinstance(quantizer, SplitQuantizer):
        return torch.cat([at_tie(part, piece) for part, piece in quantizer.pieces(x)], dim=1)
    if isinstance(quantizer, StepSwitch):
        return torch.stack([at_tie(choice, x) for choice in quantizer.choices]).any(0)
    if not isinstance(quantizer, AffineQuantizer):
        return torch.zeros_like(x, dtype=torch.bool)
    scale, zero_point = quantizer.source(x)
    u = x.double() / scale.double()
    size = torch.maximum(u.abs(), (u + zero_point).abs()).clamp(min=quantizer.spec.levels)
    return (u - u.floor() - 0.5).abs() < STEP_ERROR * size

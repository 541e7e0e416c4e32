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
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from tfmq_exp.deploy.activations import Grid
from tfmq_exp.deploy.convert import Converted
from tfmq_exp.deploy.loader import settings
from tfmq_exp.deploy.sites import Site, site_of
from tfmq_exp.deploy.weights import per_row
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
    rows, examined = list[SiteAgreement](), [site_of(model, site) for site in sites]
    for step in steps:
        out = list(compiled({**given, "step": torch.tensor(step).numpy()}).values())
        seen = [torch.from_numpy(value) for value in out[-len(taps) :]]
        t = torch.full((len(inputs["sample"]),), model.context.timesteps[step])
        with model.context.at(t), torch.no_grad():
            rows += [
                compared(site, model.context.index, seen[2 * i], seen[2 * i + 1]) for i, site in enumerate(examined)
            ]
    return rows


def compared(site: Site, steps: Int[Tensor, "batch"], x: Tensor, y: Tensor) -> SiteAgreement:
    """One layer with all rows at one step, to which the context is set."""
    wanted = site.layer(x)
    error = (y - wanted).abs() / wanted.abs().max().clamp(min=torch.finfo(torch.float32).tiny)
    beyond = error > TOLERANCE
    unexplained = beyond & ~touched(site, steps, x)
    return SiteAgreement(
        site.name, int(steps[0]), float(error.max()), error.numel(), int(beyond.sum()), int(unexplained.sum())
    )


def touched(site: Site, steps: Int[Tensor, "batch"], x: Float[Tensor, "batch ..."]) -> Bool[Tensor, "batch ..."]:
    """Outputs that some input at a tie reaches, or that are at a tie themselves."""
    layer = site.layer
    parts = x.split([piece.channels for piece in site.pieces], dim=1) if len(site.pieces) > 1 else (x,)
    ties = [at_tie(piece.grid, part, steps) for piece, part in zip(site.pieces, parts, strict=True)]
    near = torch.cat(ties, dim=1).float()
    if isinstance(layer, nn.Conv2d):
        ones = torch.ones(1, near.shape[1], *layer.kernel_size)
        reached = F.conv2d(near, ones, None, layer.stride, layer.padding, layer.dilation) > 0
    else:
        reached = near.any(-1, keepdim=True)
    quantizer, layer.output_quantizer = layer.output_quantizer, nn.Identity()
    try:
        return reached | at_tie(site.output, layer(x), steps)
    finally:
        layer.output_quantizer = quantizer


def at_tie(grid: Grid | None, x: Tensor, steps: Int[Tensor, "batch"]) -> Bool[Tensor, "batch ..."]:
    """Numbers so near the middle between two codes that rounding errors decide."""
    if grid is None:
        return torch.zeros_like(x, dtype=torch.bool)
    rows = grid.of_rows(x, steps)
    u = rows.placed(x.double())
    scale, zero_point, offset = (per_row(part, x.dim()) for part in (rows.scale, rows.zero_point, rows.offset))
    width, kept = per_row(rows.highest - rows.lowest + 1, x.dim()), per_row(1 - rows.pruned, x.dim())
    size = torch.stack(torch.broadcast_tensors((x.abs() + offset.abs()) / scale, (u + zero_point).abs(), width)).amax(0)
    return (u - u.floor() - 0.5).abs() < STEP_ERROR * size / kept

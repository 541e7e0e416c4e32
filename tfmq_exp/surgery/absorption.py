"""Scales of the input channels of linear layers: x / s and W s, with the division in the parameters before the layer where that is free."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from tfmq_exp.denoisers.families.inputs import InputGroup, Rows
from tfmq_exp.surgery.input_transforms import Division, TransformedLinear, bias_of, changed, insert_before, linear


def divided(value: Float[Tensor, "rows *inputs"], scale: Float[Tensor, "rows"], added: int = 0) -> Tensor:
    """(value + added) / scale - added, where the same bits come back for a scale of one."""
    s = scale.view(-1, *[1] * (value.dim() - 1))
    return value / s + added * (1 - s) / s if added else value / s


def divide_rows(network: nn.Module, rows: Rows, scale: Float[Tensor, "channels"]) -> None:
    """Divide outputs of a linear layer or an affine norm: W / s, b / s; under `1 +` the bias is (1 + b) / s - 1.

    A layer without a bias gets one if it needs it (AuraFlow's modulations).
    """
    module: Any = network.get_submodule(rows.module)
    if isinstance(module, TransformedLinear):
        module = module.get_submodule("layer")
    place = slice(rows.start, rows.start + len(scale))
    bias = bias_of(module) if rows.added else getattr(module, "bias", None)  # torch's RMSNorm has none
    for parameter, added in ((module.weight, 0), (bias, rows.added)):
        if parameter is not None:
            changed(parameter[place], divided(parameter[place].double(), scale, added))


def check_scale(group: InputGroup, scale: Tensor, online: bool) -> None:
    """Raise ValueError for a scale that the group cannot take."""
    names = ", ".join(group.layers)
    if scale.shape != (group.channels,):
        raise ValueError(f"the inputs of {names} need {group.channels} scales, got shape {tuple(scale.shape)}")
    if not (scale.isfinite() & (scale > 0)).all():
        wrong = scale[~(scale.isfinite() & (scale > 0))][0].item()
        raise ValueError(f"scales of the inputs of {names} must be positive and finite, got {wrong}")
    if not online and not group.rows:
        raise ValueError(
            f"a scale of the inputs of {names} cannot be absorbed: {group.reason}; online=True divides at run time"
        )


def scale_inputs(
    network: nn.Module, group: InputGroup, scale: Float[Tensor, "channels"], *, online: bool = False
) -> None:
    """Divide the inputs of a group by a scale per channel and multiply its weights by it, in place; the network computes the same.

    In adaLN the shift's and the scale's rows of the modulation layer take the division, behind attention those of the values,
    behind a product of two halves those of the one without an activation, behind an affine norm its weight and bias. Numbers are
    computed in double precision and rounded once.

    Args:
        network: of a known family, before it is quantized; layers and rows of the group are names in it.
        group: one of `input_groups`, which must come from the network before any division was put into it.
        scale: positive, one for each of the group's channels; further channels of its layers stay as they are.
        online: divide at run time, by a module before each layer, instead of in the parameters before it.

    Raises:
        ValueError: a scale of another shape, or one that is not positive; a group that is not free, unless `online`.
    """
    check_scale(group, scale, online)
    layers = [linear(network, name) for name in group.layers]
    exact = scale.to(layers[0].weight.device, torch.float64)
    for name, layer in zip(group.layers, layers, strict=True):
        columns = layer.weight[:, : group.channels]
        changed(columns, columns.double() * exact)
        if online:
            rest = exact.new_ones(layer.in_features - group.channels)
            insert_before(network, name, Division(torch.cat([exact, rest]).to(layer.weight.dtype)))
    for rows in () if online else group.rows:
        divide_rows(network, rows, exact)

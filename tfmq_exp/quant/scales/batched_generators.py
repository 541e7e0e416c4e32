"""The networks of many TDQ scales, evaluated together: a few batched products in place of hundreds of small ones."""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from tfmq_exp.quant.scales.generator import softplus_scale
from tfmq_exp.quant.scales.tdq import TDQScale


class BatchedGenerators:
    """Evaluates TDQ networks at the timesteps of a batch, which need not be of the finite set.

    While learning, timesteps are drawn from all training timesteps; a table of them all would be evaluated for a few rows.
    The scales keep their parameters, so what trains, saves or tabulates one of them is not concerned. Networks of one
    shape that read one encoding are stacked, layer by layer.

    Args:
        scales: must contain every TDQ scale of the network; those left out would be read from the table.
    """

    def __init__(self, scales: Sequence[TDQScale]) -> None:
        groups: dict[object, list[TDQScale]] = {}
        for scale in scales:
            config = scale.generator
            groups.setdefault((config.encoding, config.hidden_dims, config.dropout), []).append(scale)
        self.groups = list(groups.values())

    def scales(self, t: Int[Tensor, "rows"]) -> dict[TDQScale, Float[Tensor, "rows"]]:
        """Every provider with its scale for each timestep."""
        # half precision would move a scale by more than it is learned to differ between timesteps
        with torch.autocast(t.device.type, enabled=False):
            return {
                scale: rows for group in self.groups for scale, rows in zip(group, evaluated(group, t), strict=True)
            }


def evaluated(group: Sequence[TDQScale], t: Int[Tensor, "rows"]) -> tuple[Float[Tensor, "rows"], ...]:
    """Scales of networks that have the same layers."""
    first: Any = group[0]
    hidden: Tensor = first.encoding(t).expand(len(group), -1, -1)
    for i, layer in enumerate(first.mlp):
        if isinstance(layer, nn.Linear):
            layers: list[nn.Linear] = [scale.mlp[i] for scale in group]  # type: ignore[misc]
            weight = torch.stack([each.weight for each in layers])
            bias = torch.stack([each.bias for each in layers])
            hidden = torch.baddbmm(bias[:, None], hidden, weight.mT)
        else:
            hidden = layer(hidden)
    return softplus_scale(torch.stack([scale.scale for scale in group]), hidden.squeeze(2)).unbind()

"""Exponential moving average (EMA) of trained parameters."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn


def decay_at(number: int, decay: float) -> float:
    """Weight of the past at an update, counted from 1: (1 + n) / (10 + n) until that exceeds `decay` (LDM's LitEma)."""
    return min(decay, (1 + number) / (10 + number))


def moving_average(parameters: Sequence[nn.Parameter], decay: float) -> AveragedModel:
    """An average that starts as the parameters are now, and counts their later states by `update_parameters`."""

    def update(averaged: Sequence[Tensor], current: Sequence[Tensor], number: Tensor | int) -> None:
        get_ema_multi_avg_fn(decay_at(int(number), decay))(list(averaged), list(current), number)

    average = AveragedModel(nn.ParameterList(parameters), multi_avg_fn=update)
    average.n_averaged += 1  # the present state is the first; torch would let the first update replace it
    return average.requires_grad_(False)


@torch.no_grad()
def copy_average(average: AveragedModel, parameters: Sequence[nn.Parameter]) -> None:
    """Set the parameters to their average."""
    for parameter, mean in zip(parameters, average.module.parameters(), strict=True):
        parameter.copy_(mean)

"""The average of what is learned over the iterations, which is what is kept in the end."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

Update = Callable[[tuple[Tensor, ...] | list[Tensor], tuple[Tensor, ...] | list[Tensor], Tensor | int], None]


def decay_at(number: int, decay: float) -> float:
    """The weight of the past at an update, counted from 1: (1 + n) / (10 + n) until that passes `decay` (LDM's LitEma)."""
    return min(decay, (1 + number) / (10 + number))


def moving_average(parameters: Sequence[nn.Parameter], decay: float) -> AveragedModel:
    """An exponential moving average that starts as what the parameters are now, with every later state counted by `update_parameters`.

    Raises:
        ValueError: a decay outside [0, 1).
    """
    if not 0 <= decay < 1:
        raise ValueError(f"the decay of the average must be in [0, 1), got {decay}")

    def update(averaged: Sequence[Tensor], current: Sequence[Tensor], number: Tensor | int) -> None:
        get_ema_multi_avg_fn(decay_at(int(number), decay))(list(averaged), list(current), number)

    average = AveragedModel(nn.ParameterList(parameters), multi_avg_fn=update)
    average.n_averaged += 1  # the present state is the first; torch would let the first update replace it
    return average.requires_grad_(False)


@torch.no_grad()
def put_back(average: AveragedModel, parameters: Sequence[nn.Parameter]) -> None:
    """Give the parameters the values of their average."""
    for parameter, mean in zip(parameters, average.module.parameters(), strict=True):
        parameter.copy_(mean)

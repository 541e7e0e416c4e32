"""The release's objective by its formulas: AdaRound's penalty, and how a squared error magnifies the rounding of outputs."""

import math

import torch
from torch import Tensor

from tfmq_exp.reconstruction.objectives import Lp


def rounding_penalty(h: Tensor, beta: float) -> Tensor:
    """f_reg of AdaRound, eq. 24, by its formula."""
    return (1 - (2 * h - 1).abs().pow(beta)).sum()


def magnification(loss: Tensor | float, *targets: Tensor) -> float:
    """Ratio of the outputs' magnitude to their error: the factor by which rounding of outputs grows in a squared error."""
    power = sum(float(Lp(2).loss(target, torch.zeros_like(target), None)[0]) for target in targets)
    return max(1.0, math.sqrt(power / float(loss)))

"""Learned rounding of weights: AdaRound (Nagel et al. 2020, arXiv 2004.10568)."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

ZETA, GAMMA = 1.1, -0.1  # stretch of the rectified sigmoid, arXiv 2004.10568, section 3.3


def rectified_sigmoid(v: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """h(V) = clip(sigmoid(V) (zeta - gamma) + gamma, 0, 1): arXiv 2004.10568, eq. 23."""
    return (torch.sigmoid(v) * (ZETA - GAMMA) + GAMMA).clamp(0, 1)


def inverse_rectified_sigmoid(h: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """The V with h(V) = h, for h in [0, 1]."""
    return -torch.log((ZETA - GAMMA) / (h - GAMMA) - 1)


def rounding_penalty(h: Float[Tensor, "*shape"], beta: float) -> Float[Tensor, ""]:
    """f_reg = sum(1 - |2h - 1|^beta): zero when every weight has decided to go up or down (arXiv 2004.10568, eq. 24)."""
    return (1 - (2 * h - 1).abs().pow(beta)).sum()


class AdaRound(nn.Module):
    """Rounds x / scale to floor(x / scale) + h(V), with V learned.

    The tensor is the same at every call while its layer is reconstructed, so the floor is computed once. V starts where
    nothing is rounded at all (h = the fractional part); `harden` makes the decision: up where V >= 0.
    """

    floor: Tensor

    def __init__(self, x_over_scale: Float[Tensor, "*shape"]) -> None:
        super().__init__()
        floor = x_over_scale.detach().floor()
        self.register_buffer("floor", floor)
        self.v = nn.Parameter(inverse_rectified_sigmoid(x_over_scale.detach() - floor))
        self.soft = True
        self._h: Tensor | None = None

    @property
    def h(self) -> Float[Tensor, "*shape"]:
        """How far each weight goes up: h(V) in [0, 1] while soft, 0 or 1 when hard. Soft values are those of the last call."""
        if not self.soft:
            return (self.v >= 0).to(self.v.dtype)
        return rectified_sigmoid(self.v) if self._h is None else self._h

    def forward(self, x_over_scale: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """The rounded tensor; `x_over_scale` is the one given at construction."""
        if self.soft:
            self._h = rectified_sigmoid(self.v)  # kept: the penalty reads it in the same iteration
        return self.floor + self.h

    def harden(self) -> None:
        """Decide: from here on every weight is rounded up or down."""
        self.soft, self._h = False, None

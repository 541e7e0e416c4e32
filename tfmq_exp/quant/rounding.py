"""Learned rounding of weights: AdaRound (Nagel et al. 2020, arXiv 2004.10568).

The two functions that run in every iteration have their gradients written out: autograd's own graph takes several times as long.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from tfmq_exp.quant.functional import dequantize
from tfmq_exp.quant.spec import QParams, QuantSpec

NEAR = 0.9  # h of a code that learning starts from: far enough from a tie to stay where nothing is gained
ZETA, GAMMA = 1.1, -0.1  # stretch of the rectified sigmoid, arXiv 2004.10568, section 3.3


def rectified_sigmoid(v: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """h(V) = clip(sigmoid(V) (zeta - gamma) + gamma, 0, 1): arXiv 2004.10568, eq. 23."""
    return (torch.sigmoid(v) * (ZETA - GAMMA) + GAMMA).clamp(0, 1)


def inverse_rectified_sigmoid(h: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """The V with h(V) = h, for h in [0, 1]."""
    return -torch.log((ZETA - GAMMA) / (h - GAMMA) - 1)


class _Between(torch.autograd.Function):
    """(V, below, gap) -> (below + gap h(V), h(V))."""

    @staticmethod
    def forward(ctx: Any, v: Tensor, below: Tensor, gap: Tensor) -> tuple[Tensor, Tensor]:
        sigmoid = torch.sigmoid(v)
        h = sigmoid.mul(ZETA - GAMMA).add_(GAMMA).clamp_(0, 1)
        ctx.save_for_backward(sigmoid, h, gap)
        return torch.addcmul(below, gap, h), h

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        sigmoid, h, gap = ctx.saved_tensors
        to_weight, to_h = grads
        slope = sigmoid.mul(1 - sigmoid).mul_(ZETA - GAMMA)
        slope.mul_((h > 0).logical_and_(h < 1))
        return torch.addcmul(to_h, to_weight, gap).mul_(slope), None, None


class _Penalty(torch.autograd.Function):
    """sum(1 - |2h - 1|^beta), with one power for value and gradient."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, beta: float) -> Tensor:
        signed = h.mul(2).sub_(1)
        distance = signed.abs()
        # |2h - 1|^(beta - 1), at least e^-60: log 0 is -inf, and denormal numbers would slow down all that follows
        power = distance.log().mul_(beta - 1).clamp_(min=-60).exp_()
        ctx.save_for_backward(power.mul(signed.sign_()).mul_(-2 * beta))
        return h.numel() - power.mul_(distance).sum()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (slope,) = ctx.saved_tensors
        return slope * grads[0], None


def rounding_penalty(h: Float[Tensor, "*shape"], beta: float) -> Float[Tensor, ""]:
    """f_reg = sum(1 - |2h - 1|^beta), beta > 1: zero once every weight is rounded up or down (eq. 24)."""
    return _Penalty.apply(h, beta)  # type: ignore[no-any-return]


class AdaRound(nn.Module):
    """A weight that learns, element by element, whether to be rounded down or up.

    While soft it is below + h(V) (above - below), which starts at the weight itself wherever the integers reach it.
    `harden` decides: up where V >= 0. With `codes`, integers that were found otherwise, it starts near them, and chooses between
    each of them and its neighbour on the weight's side.
    """

    floor: Tensor
    below: Tensor
    gap: Tensor

    def __init__(
        self,
        weight: Float[Tensor, "*shape"],
        q: QParams,
        spec: QuantSpec,
        codes: Float[Tensor, "*shape"] | None = None,
    ) -> None:
        super().__init__()
        x = weight.detach() / q.scale
        floor = x.floor()
        h = x - floor
        if codes is not None:
            up = x < codes - q.zero_point  # the code is above the weight
            floor = codes - q.zero_point - up.to(x.dtype)
            h = torch.where(up, NEAR, 1 - NEAR).to(x.dtype)
        below, above = ((floor + up + q.zero_point).clamp(spec.qmin, spec.qmax) for up in (0, 1))
        self.register_buffer("floor", floor)
        self.register_buffer("below", dequantize(below, q))
        self.register_buffer("gap", q.scale * (above - below))  # not a difference of rounded reals: exact
        self.v = nn.Parameter(inverse_rectified_sigmoid(h))
        self.soft = True
        # of the last forward pass: the penalty shares its gradient, which is then computed once
        self.h = rectified_sigmoid(self.v.detach())

    def forward(self, x_over_scale: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """The rounded weight in units of the scale, before clamping: a `Rounding` for `quantize`."""
        up = rectified_sigmoid(self.v) if self.soft else (self.v >= 0).to(self.v.dtype)
        return self.floor + up

    def weight(self) -> Float[Tensor, "*shape"]:
        """The soft weight; keeps its `h` for the penalty."""
        weight, self.h = _Between.apply(self.v, self.below, self.gap)  # type: ignore[misc]
        return weight

    def soften(self) -> None:
        """Learn from where it is."""
        self.soft = True
        self.h = rectified_sigmoid(self.v.detach())

    def harden(self) -> None:
        """Round every weight up or down from now on."""
        self.soft = False
        self.h = (self.v >= 0).to(self.v.dtype)

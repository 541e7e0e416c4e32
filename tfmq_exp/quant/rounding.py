"""Learned rounding of weights: AdaRound (Nagel et al. 2020, arXiv 2004.10568)."""

from collections.abc import Sequence

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


def penalty_gradient(h: Float[Tensor, "*shape"], beta: float) -> Float[Tensor, "*shape"]:
    """Gradient to h of f_reg = sum(1 - |2h - 1|^beta), beta > 1: arXiv 2004.10568, eq. 24."""
    signed = h.mul(2).sub_(1)
    # |2h - 1|^(beta - 1), at least e^-60: log 0 is -inf, and denormal numbers would slow down all that follows
    power = signed.abs().log_().mul_(beta - 1).clamp_(min=-60).exp_()
    return power.copysign_(signed).mul_(-2 * beta)


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
        self.shared: Tensor | None = None  # its part of a `JointRounding`'s soft weights, while that learns

    def forward(self, x_over_scale: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """The rounded weight in units of the scale, before clamping: a `Rounding` for `quantize`."""
        up = rectified_sigmoid(self.v) if self.soft else (self.v >= 0).to(self.v.dtype)
        return self.floor + up

    @property
    def h(self) -> Float[Tensor, "*shape"]:
        """Rectified sigmoid of V, between 0 (down) and 1 (up)."""
        return rectified_sigmoid(self.v)

    def weight(self) -> Float[Tensor, "*shape"]:
        """The soft weight; differentiable in V unless a `JointRounding` learns it."""
        return torch.addcmul(self.below, self.gap, self.h) if self.shared is None else self.shared

    def soften(self) -> None:
        """Learn from where it is."""
        self.soft = True

    def harden(self) -> None:
        """Round every weight up or down from now on."""
        self.soft, self.shared = False, None


class JointRounding:
    """AdaRound of several weights with one vector V, whose gradient is written out.

    Autograd knows the soft weights alone, as leaves: its graph from V to them would take several times as long.
    """

    def __init__(self, roundings: Sequence[AdaRound]) -> None:
        self.roundings = roundings
        self.v = nn.Parameter(joined([rounding.v.detach() for rounding in roundings]))
        self.below, self.gap = (joined([getattr(r, name) for r in roundings]) for name in ("below", "gap"))
        self.sigmoid, self.h, self.weight = (torch.empty_like(self.below) for _ in range(3))
        begin = 0
        for rounding in roundings:
            own = slice(begin, begin := begin + rounding.v.numel())
            rounding.v.data = self.v.data[own].view_as(rounding.v)
            rounding.below, rounding.gap = (x[own].view_as(rounding.v) for x in (self.below, self.gap))
            rounding.shared = self.weight[own].view_as(rounding.v).detach().requires_grad_()
        self.update()

    @property
    def weights(self) -> list[Tensor]:
        """The soft weights that the layers use, as leaves of autograd."""
        return [rounding.weight() for rounding in self.roundings]

    @property
    def undecided(self) -> Float[Tensor, ""]:
        """Share of the weights that are neither rounded down nor up yet."""
        return ((self.h > 0) & (self.h < 1)).float().mean()

    @torch.no_grad()
    def update(self) -> None:
        """Set h and the soft weights from V."""
        torch.sigmoid(self.v, out=self.sigmoid)
        torch.mul(self.sigmoid, ZETA - GAMMA, out=self.h).add_(GAMMA).clamp_(0, 1)
        torch.addcmul(self.below, self.gap, self.h, out=self.weight)

    @torch.no_grad()
    def gradient(self, to_weights: Float[Tensor, "n"], to_h: Float[Tensor, "n"] | None = None) -> Float[Tensor, "n"]:
        """Gradient to V at the last update.

        Args:
            to_weights: gradient to all soft weights, one after the other.
            to_h: gradient to h, of the penalty.
        """
        gradient = to_weights * self.gap if to_h is None else torch.addcmul(to_h, to_weights, self.gap)
        torch.ops.aten.hardtanh_backward.grad_input(gradient, self.h, 0.0, 1.0, grad_input=gradient)  # of the clamp
        torch.ops.aten.sigmoid_backward.grad_input(gradient, self.sigmoid, grad_input=gradient)
        return gradient.mul_(ZETA - GAMMA)


def joined(tensors: Sequence[Tensor]) -> Float[Tensor, "n"]:
    """All elements as one vector; none for no tensors."""
    return torch.cat([x.flatten() for x in tensors]) if tensors else torch.empty(0)

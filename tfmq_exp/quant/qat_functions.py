"""Quantizer functions of quantization-aware training (QAT): the arithmetic, as frozen dataclasses.

A function takes x, a scale, the integer range, and a few parameters of its own. The range parameters of the papers are
multiples of the scale, so that a scale generated from the timestep (TDQ) fits every function.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from tfmq_exp.core.validate import AMOUNT, Checked
from tfmq_exp.quant.functional import round_ste, ste_quantize, within_range
from tfmq_exp.quant.spec import IntRange, IntRangeKind

SMALLEST = 1e-12  # below it a power of QIL's transformed magnitude has no usable logarithm
BINS = 256  # of NIPQ's histogram of rounding errors, in the release
MAX_COUNTED = 65536  # errors
QUANTILES = 4096  # at which the inverse of its distribution function is tabulated
Extra = Mapping[str, Tensor]  # values of a function's own parameters, scalars


class ExtraParam(NamedTuple):
    """Initial value of a parameter that is trained with the scale, and the interval that it is clamped to."""

    init: float
    min: float
    max: float


@dataclass(frozen=True)
class QATQuantizeFn(Checked):
    """s * round(clip(x / s)) with straight-through gradients, unless a subclass says otherwise.

    `decay` is the weight of the L2 penalty on the clip value s * qmax; `int_range` see `spec.int_range`.
    """

    int_range: IntRangeKind = "full"
    decay: Annotated[float, AMOUNT] = 0.0

    def extra_params(self) -> Mapping[str, ExtraParam]:
        """Parameters that are trained with the scale, by name."""
        return {}

    def codes(self, x: Tensor, scale: Tensor, ints: IntRange, extra: Extra) -> Tensor:
        """Integer codes of `x` (as floats), without a gradient. The arguments are those of `__call__`."""
        return (x / scale).clamp_(ints.qmin, ints.qmax).round_()

    def output_scale(self, scale: Tensor, extra: Extra) -> Tensor:
        """Real value of one code."""
        return scale

    def __call__(self, x: Tensor, scale: Tensor, ints: IntRange, extra: Extra) -> Tensor:
        """Simulated quantization with the gradients of training; `scale` broadcasts against `x`, `extra` are `extra_params`."""
        return ste_quantize(x, scale, ints)

    def for_inference(self) -> "QATQuantizeFn":
        """The function after training: the same values without noise and penalty; plain rounding."""
        return Lsq(self.int_range)


@dataclass(frozen=True)
class Lsq(QATQuantizeFn):
    """Learned Step Size Quantization (LSQ, arXiv 1902.08153).

    The scale learns from rounding errors of values in the range and from all that is clipped (eq. 3). `scaled` multiplies its
    gradient by 1 / sqrt(values * qmax) (section 2.2). TDQ's release does not, for activations.
    """

    kind: ClassVar[str] = "lsq"
    scaled: bool = True

    def __call__(self, x: Tensor, scale: Tensor, ints: IntRange, extra: Extra) -> Tensor:
        return ste_quantize(x, scale, ints, factor=(ints.num_values * ints.qmax) ** -0.5 if self.scaled else 1.0)


@dataclass(frozen=True)
class Pact(QATQuantizeFn):
    """Parameterized Clipping Activation (PACT, arXiv 1805.06085).

    The clip value alpha = s qmax learns from what is clipped alone, and shrinks under its L2 penalty: d/d alpha is 1 for
    x >= alpha, for a signed range -1 for x <= -alpha, 0 elsewhere.
    """

    int_range: IntRangeKind = "narrow"
    decay: Annotated[float, AMOUNT] = 1e-4

    def __call__(self, x: Tensor, scale: Tensor, ints: IntRange, extra: Extra) -> Tensor:
        return ste_quantize(x, scale, ints, only_clipped=True)


@dataclass(frozen=True)
class Nipq(QATQuantizeFn):
    """Noise Injection Pseudo Quantization (NIPQ, arXiv 2206.00820), with fixed bits.

    Noise with the distribution of the rounding error in training; plain rounding afterwards, as the release trains its last
    epochs. Inside the range x + s noise, outside its ends; gradients of alpha = s qmax are noise / qmax and the sign. No gradient
    passes through the noise. The network's bits are not learned: with fixed bits the noise on them rounds away.
    """

    int_range: IntRangeKind = "narrow"

    def __call__(self, x: Tensor, scale: Tensor, ints: IntRange, extra: Extra) -> Tensor:
        with torch.no_grad():
            u = x / scale
            noise = error_noise(torch.where(within_range(u, ints), u.round() - u, 1.0))
        return ste_quantize(x, scale, ints, noise)


@dataclass(frozen=True)
class Duq(QATQuantizeFn):
    """DuQ, the quantizer of PROFIT (arXiv 2008.04693): c round(clip(x / a, -1, 1) L) / L with a = s L.

    One range makes the codes, another, c = gain * a, gives their real values; the ratio is trained, so that c follows an `a`
    that depends on the timestep.
    """

    kind: ClassVar[str] = "duq"
    int_range: IntRangeKind = "narrow"

    def extra_params(self) -> Mapping[str, ExtraParam]:
        return {"gain": ExtraParam(1.0, 1e-3, 1e3)}

    def output_scale(self, scale: Tensor, extra: Extra) -> Tensor:
        return scale * extra["gain"]

    def __call__(self, x: Tensor, scale: Tensor, ints: IntRange, extra: Extra) -> Tensor:
        # gradients pass through rounding, so that of `a` inside the range is - c x / a^2 at constant c
        return round_ste((x / scale).clamp(ints.qmin, ints.qmax)) * self.output_scale(scale, extra)

    def for_inference(self) -> "Duq":
        return Duq(self.int_range)


@dataclass(frozen=True)
class Qil(QATQuantizeFn):
    """Quantization Interval Learning (QIL, arXiv 1808.05779): an interval of magnitudes with a centre c and a distance d.

    Magnitudes below c - d become 0, those above c + d saturate, between them codes are uniform (eq. 1 to 5). c + d = s qmax is
    given by the scale; `pruned` = (c - d) / (c + d) is trained, 0 at the start, where c = d. The paper's values lie in [-1, 1]
    and are scaled by the next layer's normalisation; here c + d restores them. `learn_gamma` trains an exponent that bends the
    interval, for weights alone: integers hide it afterwards.

    Raises:
        ValueError: the full integer range, which has one more code below zero.
    """

    kind: ClassVar[str] = "qil"
    int_range: IntRangeKind = "narrow"
    learn_gamma: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.int_range == "full":
            raise ValueError("QIL's range is symmetric: int_range must be narrow or tdq_release, got 'full'")

    def extra_params(self) -> Mapping[str, ExtraParam]:
        gamma = {"gamma": ExtraParam(1.0, 0.1, 10.0)} if self.learn_gamma else {}
        return {"pruned": ExtraParam(0.0, 0.0, 0.99), **gamma}

    def transformed(self, x: Tensor, scale: Tensor, ints: IntRange, extra: Extra) -> Tensor:
        """The transformer, in units of codes: from 0 at c - d to qmax at c + d. The arguments are those of `__call__`."""
        pruned = extra["pruned"]
        reach = (((x / scale).abs() - pruned * ints.qmax) / (1 - pruned)).clamp(0, ints.qmax)
        if not self.learn_gamma:
            return reach
        share = (reach / ints.qmax).clamp(min=SMALLEST)
        return torch.where(reach > 0, ints.qmax * share.pow(extra["gamma"]), 0)

    def sign(self, x: Tensor, ints: IntRange) -> Tensor:
        """Sign of x; 0 for negative x under an unsigned range."""
        return x.sign() if ints.qmin < 0 else (x > 0).to(x.dtype)

    def codes(self, x: Tensor, scale: Tensor, ints: IntRange, extra: Extra) -> Tensor:
        return self.transformed(x, scale, ints, extra).round() * self.sign(x, ints)

    def __call__(self, x: Tensor, scale: Tensor, ints: IntRange, extra: Extra) -> Tensor:
        # gradients pass through rounding, and through the transformer to the scale and to `pruned`
        return round_ste(self.transformed(x, scale, ints, extra)) * self.sign(x, ints) * scale

    def for_inference(self) -> "Qil":
        return Qil(self.int_range, learn_gamma=self.learn_gamma)


def error_noise(errors: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Independent values with the distribution of `errors`: that of a histogram over [-1/2, 1/2], uniform in each bin.

    Values outside that interval do not count; uniform where none is inside. Of many values, random ones are counted: a regular
    stride would hit the same column of every image, or the same tap of every kernel. Draws from torch's generator of the device.
    """
    counted = errors.flatten()
    if len(counted) > MAX_COUNTED:
        counted = counted[torch.randint(len(counted), (MAX_COUNTED,), device=counted.device)]
    counts = torch.histc(counted.float(), BINS, -0.5, 0.5)
    values = quantiles(torch.where(counts.sum() > 0, counts, torch.ones_like(counts)))
    # a table look-up: a search for each value takes longer than the rest of a training step
    place = torch.rand(errors.numel(), device=errors.device).mul_(QUANTILES)
    cell = place.int()
    low, high = values[:-1].index_select(0, cell), values[1:].index_select(0, cell)
    return torch.lerp(low, high, place.sub_(cell)).reshape(errors.shape).to(errors.dtype)


def quantiles(counts: Float[Tensor, "bins"]) -> Float[Tensor, "quantiles"]:
    """Values that equal shares of a histogram's mass lie below, from the lowest that has any to the highest."""
    below = torch.nn.functional.pad(counts.double().cumsum(0), (1, 0))
    mass = torch.linspace(0, 1, QUANTILES + 1, dtype=below.dtype, device=below.device) * below[-1]
    bins = torch.searchsorted(below[1:].contiguous(), mass, right=False).clamp_(max=BINS - 1)
    within = ((mass - below[bins]) / counts.double()[bins].clamp(min=1)).clamp(0, 1)
    return ((bins + within) / BINS - 0.5).float()

"""Quantizers of activations and of weights, their modes, and combinations of several for one tensor."""

from collections.abc import Generator, Iterable, Sequence
from contextlib import contextmanager
from enum import Enum
from typing import Any, Generic, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from tfmq_exp.core.finite import require_finite
from tfmq_exp.quant.functional import dequantize, fake_quantize, qparams_from_range, quantize, round_ste
from tfmq_exp.quant.observers import Observer
from tfmq_exp.quant.rounding import AdaRound
from tfmq_exp.quant.scales.base import ScaleProvider
from tfmq_exp.quant.spec import QParams, QuantSpec
from tfmq_exp.quant.timestep_context import TimestepContext


class Mode(Enum):
    """Pass a tensor through, observe it on the way, or quantize it."""

    OFF = "off"
    OBSERVE = "observe"
    QUANTIZE = "quantize"


class Quantizer(nn.Module):
    """Acts on a tensor according to its mode; shape and dtype do not change."""

    mode: Mode = Mode.OFF

    def forward(self, x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        if self.mode is Mode.QUANTIZE:
            return self.quantize(x)
        if self.mode is Mode.OBSERVE:
            self.observe(x)
        return x

    def observe(self, x: Float[Tensor, "*shape"]) -> None:
        """Take the range of `x` into account."""
        raise NotImplementedError

    def quantize(self, x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """Simulated quantization."""
        raise NotImplementedError


@contextmanager
def modes(quantizers: Iterable[Quantizer], mode: Mode) -> Generator[None]:
    """Set the mode of some quantizers for the duration of a block."""
    before = [(quantizer, quantizer.mode) for quantizer in quantizers]
    try:
        for quantizer, _ in before:
            quantizer.mode = mode
        yield
    finally:
        for quantizer, was in before:
            quantizer.mode = was


class AffineQuantizer(Quantizer):
    """Quantizes activations with the scale and zero point that its provider gives."""

    def __init__(self, scale_provider: ScaleProvider) -> None:
        super().__init__()
        self.scale_provider = scale_provider

    @property
    def spec(self) -> QuantSpec:
        return self.scale_provider.spec

    def observe(self, x: Float[Tensor, "batch *rest"]) -> None:
        self.scale_provider.observe(x.detach())

    def quantize(self, x: Float[Tensor, "batch *rest"]) -> Float[Tensor, "batch *rest"]:
        return fake_quantize(x, self.scale_provider(x), self.spec)

    def tabulate(self) -> None:
        """Prepare for sampling: generated scales become a table."""
        self.scale_provider = self.scale_provider.tabulated()


class WeightQuantizer(Quantizer):
    """Quantizes one weight, whose range is set from the weight itself by an observer and whose rounding may be learned."""

    scale: nn.Parameter
    zero_point: Tensor

    def __init__(self, weight: Float[Tensor, "out *rest"], spec: QuantSpec, observer: Observer) -> None:
        super().__init__()
        self.spec, self.observer = spec, observer
        one = weight.detach().new_ones(spec.range_shape(weight.shape))
        self.scale = nn.Parameter(one, requires_grad=False)
        self.register_buffer("zero_point", torch.zeros_like(one))
        self.rounding: AdaRound | None = None

    def observe(self, x: Float[Tensor, "out *rest"]) -> None:
        """Set scale and zero point from this weight; ValueError for ends of another shape than the scale, or not finite."""
        lo, hi = self.observer(x.detach(), self.spec)
        name = type(self.observer).__name__
        if not lo.shape == hi.shape == self.scale.shape:
            raise ValueError(
                f"the observer {name} must give two ends of shape {tuple(self.scale.shape)} for a weight of shape "
                f"{tuple(x.shape)}, got {tuple(lo.shape)} and {tuple(hi.shape)}"
            )
        require_finite(torch.stack([lo, hi]), f"a range of {name}")
        scale, zero_point = qparams_from_range(lo, hi, self.spec)
        self.scale.copy_(scale)
        self.zero_point.copy_(zero_point)

    @property
    def qparams(self) -> QParams:
        return QParams(self.scale, self.zero_point)

    def round_to(self, weight: Float[Tensor, "out *rest"], codes: Float[Tensor, "out *rest"]) -> None:
        """Round the weight to these integers."""
        self.rounding = AdaRound(weight, self.qparams, self.spec, codes)
        self.rounding.harden()

    def learn_rounding(self, weight: Float[Tensor, "out *rest"]) -> AdaRound:
        """Start AdaRound on this weight: near the integers of `round_to`, or at the weight itself."""
        self.rounding = self.rounding or AdaRound(weight, self.qparams, self.spec)
        self.rounding.soften()
        return self.rounding

    def codes(self, weight: Float[Tensor, "out *rest"]) -> Float[Tensor, "out *rest"]:
        """Integer codes of the weight under the current rounding, as floats."""
        return quantize(weight, self.qparams, self.spec, self.rounding or round_ste)

    def quantize(self, x: Float[Tensor, "out *rest"]) -> Float[Tensor, "out *rest"]:
        """Simulated quantization; while AdaRound is being learned, its soft weight."""
        if self.rounding is not None and self.rounding.soft:
            return self.rounding.weight()
        return dequantize(self.codes(x), self.qparams)


Part = TypeVar("Part", bound=Quantizer)


class SplitQuantizer(nn.Module, Generic[Part]):
    """One quantizer for each group of consecutive channels: shortcut splitting (Q-Diffusion, arXiv 2302.04304, section 3.3).

    Channels are dimension 1 both of activations and of a convolution's weight (its inputs), so this serves both. The parts keep
    their own modes. Equal to a single quantizer where their parameters are equal; `sizes` are their numbers of channels.
    """

    def __init__(self, parts: Sequence[Part], sizes: Sequence[int]) -> None:
        super().__init__()
        if len(parts) != len(sizes) or min(sizes) < 1:
            raise ValueError(f"{len(parts)} quantizers cannot share channels in groups of {tuple(sizes)}")
        self.parts, self.sizes = nn.ModuleList(parts), tuple(sizes)

    def pieces(self, x: Float[Tensor, "first channels *rest"]) -> list[tuple[Part, Tensor]]:
        """Every quantizer with its channels."""
        return list(zip(self.parts, x.split(self.sizes, dim=1), strict=True))  # type: ignore[arg-type]

    def forward(self, x: Float[Tensor, "first channels *rest"]) -> Float[Tensor, "first channels *rest"]:
        return torch.cat([part(piece) for part, piece in self.pieces(x)], dim=1)


class StepSwitch(nn.Module):
    """Several quantizers of one activation, one of which acts at each step: step-aware mixed precision.

    PTQD, arXiv 2305.10657, section 3.4. The widest acts until a choice is made. Weights do not change with the step, so one copy
    of them serves all.
    """

    at: Tensor

    def __init__(self, choices: Sequence[AffineQuantizer], context: TimestepContext) -> None:
        super().__init__()
        self.choices, self.context = nn.ModuleList(choices), context
        self.bits = tuple(choice.spec.bits for choice in choices)
        widest = self.bits.index(max(self.bits))
        self.used = (widest,)  # by any step; while it is one, no forward pass has to wait for the device to look
        self.register_buffer("at", torch.full((context.num_steps,), widest), persistent=False)

    def use(self, bits: Sequence[int]) -> None:
        """Set the bit-width of every step. Raises ValueError for a width that is not among the choices, or too few."""
        if len(bits) != self.context.num_steps:
            raise ValueError(f"{self.context.num_steps} steps need as many bit-widths, got {len(bits)}")
        if wrong := set(bits).difference(self.bits):
            raise ValueError(f"no quantizer has {min(wrong)} bits; there are {', '.join(map(str, self.bits))}")
        at = [self.bits.index(b) for b in bits]
        self.at.copy_(torch.tensor(at))
        self.used = tuple(sorted({*at}))

    def forward(self, x: Float[Tensor, "batch *rest"]) -> Float[Tensor, "batch *rest"]:
        """Quantize each row with the choice of its step; while the choices observe, give `x` to all of them."""
        if any(choice.mode is not Mode.QUANTIZE for choice in self.choices):
            for choice in self.choices:
                choice(x)
            return x
        if len(self.used) == 1:
            return self.choices[self.used[0]](x)
        chosen = self.at[self.context.steps_of(x)]
        used = sorted({int(i) for i in chosen.cpu()})
        if len(used) == 1:
            return self.choices[used[0]](x)
        rows, out = chosen.reshape(-1, *(1,) * (x.dim() - 1)), x
        for i in used:
            out = torch.where(rows == i, self.choices[i](x), out)
        return out


def tie(quantizers: Sequence[Any]) -> None:
    """Give all of them the parameters of the first: what one of them learns, all do."""
    for name, _ in list(quantizers[0].named_parameters()):
        owner, _, leaf = name.rpartition(".")
        shared = quantizers[0].get_parameter(name)
        for other in quantizers[1:]:
            setattr(other.get_submodule(owner), leaf, shared)

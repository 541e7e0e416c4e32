"""The small network (MLP) that generates a scale, and the encodings of the timestep that it may read (TDQ, arXiv 2306.02316)."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Annotated, ClassVar, Literal, Self

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import softplus

from tfmq_exp.core.seeds import derive_seed
from tfmq_exp.core.validate import COUNT, DECAY, POSITIVE, SEED, Checked, Kind, sequence_of, whole
from tfmq_exp.quant.functional import SMALLEST_SCALE
from tfmq_exp.quant.scales.observed_ranges import EMAConfig, EMARange
from tfmq_exp.quant.spec import QuantSpec
from tfmq_exp.quant.timestep_context import TimestepContext

LayerInit = Literal["zero", "default", "he", "xavier", "gaussian"]
INITS = {"he": nn.init.kaiming_normal_, "xavier": nn.init.xavier_normal_, "gaussian": nn.init.normal_}
# cosines and sines share it
WIDTH = Kind(
    "an even whole number from 2 to 65536", lambda value: whole(value) and 2 <= value <= 2**16 and value % 2 == 0
)


class TimeEncoding(Checked):
    """Timesteps [steps] as vectors [steps, width]."""

    def __call__(self, t: Int[Tensor, "steps"]) -> Float[Tensor, "steps width"]:
        raise NotImplementedError


@dataclass(frozen=True)
class Frequency(TimeEncoding):
    """[cos(t w_i), sin(t w_i)], w_i = 10000^(-2i / width): the encoding of the UNet itself; TDQ's choice."""

    kind: ClassVar[str] = "frequency"
    width: Annotated[int, WIDTH]

    def __call__(self, t: Int[Tensor, "steps"]) -> Float[Tensor, "steps width"]:
        half = self.width // 2
        angles = t.float()[:, None] * torch.exp(-math.log(10000) * torch.arange(half, device=t.device) / half)
        return torch.cat([angles.cos(), angles.sin()], dim=1)


@dataclass(frozen=True)
class Normalised(TimeEncoding):
    """t / T, one number: what TDQ_thin reads. T = 1 leaves raw timesteps, with which TDQ's training diverges."""

    kind: ClassVar[str] = "normalised"
    train_timesteps: Annotated[int, COUNT]

    def __call__(self, t: Int[Tensor, "steps"]) -> Float[Tensor, "steps 1"]:
        return t.float()[:, None] / self.train_timesteps


@dataclass(frozen=True)
class RandomFourier(TimeEncoding):
    """[cos 2 pi B t / T, sin 2 pi B t / T], B drawn once from N(0, sigma^2)."""

    kind: ClassVar[str] = "random_fourier"
    width: Annotated[int, WIDTH]
    sigma: Annotated[float, POSITIVE]
    train_timesteps: Annotated[int, COUNT]
    seed: Annotated[int, SEED] = 0

    def __call__(self, t: Int[Tensor, "steps"]) -> Float[Tensor, "steps width"]:
        generator = torch.Generator().manual_seed(self.seed)
        b = self.sigma * torch.randn(self.width // 2, generator=generator).to(t.device)
        angles = 2 * math.pi * (t.float()[:, None] / self.train_timesteps) * b
        return torch.cat([angles.cos(), angles.sin()], dim=1)


@dataclass(frozen=True)
class GeneratorConfig(EMAConfig):
    """Scales that an MLP generates.

    Args:
        encoding: of the timestep, as the MLP reads it; None for an MLP that does not read it.
        hidden_dims: widths of the hidden layers; (64, 64, 64) in TDQ, (16, 16) in TDQ_thin.
        dropout: before the last layer, while it learns.
        last_layer_init: `zero` starts every scale at the calibrated one; the others are the supplement's ablation (table 7).
        seed: of the other layers' weights.
        momentum, observer: of the calibrated range, see `EMAConfig`.
    """

    encoding: TimeEncoding | None
    hidden_dims: Annotated[tuple[int, ...], sequence_of(COUNT)]
    dropout: Annotated[float, DECAY] = 0.0
    last_layer_init: LayerInit = "zero"
    seed: Annotated[int, SEED] = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "hidden_dims", tuple(self.hidden_dims))

    def seeded_for(self, name: str) -> Self:
        return replace(self, seed=derive_seed(self.seed, name))

    def mlp(self, width: int) -> nn.Sequential:
        """Linear layers with ReLU between them and one output, whose bias is 0; dropout before the last."""
        generator = torch.Generator().manual_seed(self.seed)
        layers: list[nn.Module] = []
        for size in self.hidden_dims:
            layers += [initialized(nn.Linear(width, size), "default", generator), nn.ReLU()]
            width = size
        output = initialized(nn.Linear(width, 1), self.last_layer_init, generator)
        nn.init.zeros_(output.bias)  # the scale at the start is the bias of the last layer
        return nn.Sequential(*layers, nn.Dropout(self.dropout), output).requires_grad_(False)


class GeneratedScale(EMARange):
    """A static range s_0 that is calibrated, and an MLP of `width` inputs that is learned: s = softplus(MLP + softplus^-1(s_0))."""

    generates = True

    def __init__(self, config: GeneratorConfig, spec: QuantSpec, context: TimestepContext, width: int) -> None:
        super().__init__(config, spec, context)
        self.generator, self.encoding, self.mlp = config, config.encoding, config.mlp(width)

    def trainable(self) -> Iterator[nn.Parameter]:
        return self.mlp.parameters()

    def clamp_parameters(self) -> None:
        """Nothing to clamp: softplus keeps scales positive."""


def initialized(layer: nn.Linear, init: LayerInit, generator: torch.Generator) -> nn.Linear:
    """The layer with new weights. `default` is torch's for linear layers, bias included; else the bias starts at 0."""
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    if init in INITS:
        INITS[init](layer.weight, generator=generator)
    elif init == "default":
        for parameter in (layer.weight, layer.bias):
            nn.init.uniform_(parameter, -(layer.in_features**-0.5), layer.in_features**-0.5, generator=generator)
    return layer


def softplus_inverse(y: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """The x with log(1 + e^x) = y, for y > 0."""
    return y + torch.log(-torch.expm1(-y))


def softplus_scale(start: Float[Tensor, "*start"], moved: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """softplus(moved + softplus^-1(start)), as a multiple of `start` that is exactly 1 where `moved` is 0."""
    bias = softplus_inverse(start.double()).to(start.dtype)
    return (start * (softplus(moved + bias) / softplus(bias))).clamp(min=SMALLEST_SCALE)

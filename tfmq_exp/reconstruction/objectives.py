"""Objectives of reconstruction: the error of a unit's outputs, and the annealing of the penalty on undecided rounding."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from tfmq_exp.core.validate import DECAY, POWER, SEED, Kind, check_fields, number
from tfmq_exp.denoisers.families.find import family_of
from tfmq_exp.reconstruction.activation_cache import TensorTree
from tfmq_exp.reconstruction.capture import Capture
from tfmq_exp.reconstruction.units import Unit

Values = Float[Tensor, "batch *rest"]
SMALLEST_SHARE = 1e-3  # of the mean over segments, that a segment's mean square counts as
EXPONENT = Kind("a number above 1", lambda value: number(value) and value > 1)


class Objective:
    """Error of one output of a unit, |error|^p, with an optional weight for each element."""

    p: float = 2.0
    needs_network: ClassVar[bool] = False  # all of it at once, for the importance of outputs

    def importance(self, network: nn.Module, units: Sequence[Unit], capture: Capture) -> Mapping[str, TensorTree]:
        """Unit name -> weights of the elements of its outputs in the float network, for the units that have any."""
        return {}

    def feature_importance(self, network: nn.Module, features: TensorTree) -> TensorTree | None:
        """Weights of the elements of the float network's temporal features; None where all count alike."""
        return None

    def loss(self, prediction: Values, target: Values, importance: Values | None) -> tuple[Float[Tensor, ""], Values]:
        """Error summed over channels and averaged over everything else, and its gradient to the prediction.

        Channels are dimension 1 of feature maps and features, the last one of tokens. The releases sum over dimension 1 of
        tokens too, which ties the balance of the two terms to the resolution. Autograd would take twice as long.
        """
        error = prediction.detach() - target
        slope = error if self.p == 2 else error.abs().pow_(self.p - 1).copysign_(error)
        weighted = slope if importance is None else slope * importance
        share = target.shape[2 if target.dim() == 3 else 1] / target.numel()
        return torch.dot(weighted.flatten(), error.flatten()) * share, weighted * (self.p * share)


@dataclass(frozen=True)
class Lp(Objective):
    """|error|^p: p = 2 for weights, 2.4 for activation scales in all the releases."""

    p: float = 2.0

    def __post_init__(self) -> None:
        check_fields(self, p=POWER)


@dataclass(frozen=True)
class Segments(Objective):
    """Squared error, of temporal features that of every shift, scale and gate relative to its own mean square.

    Blocks use the parts of a feature in different ways, and their sizes differ; unweighted, the largest part decides. The sum of
    all weighted squares stays that of the features, which keeps the balance with the rounding penalty.
    """

    def feature_importance(self, network: nn.Module, features: TensorTree) -> TensorTree | None:
        width = family_of(network).segment(network)
        parts = [feature.double().square() for feature in features.tensors]
        means = [segment_means(squares, width) for squares in parts]
        known = torch.cat([mean.flatten() for mean in means])
        floor = SMALLEST_SHARE * known.mean()  # a part that is hardly there counts little
        weights = [1 / mean.clamp(min=floor) for mean in means]
        total = sum(float(x.sum()) for x in parts)
        weighted = sum(float((x * weight).sum()) for x, weight in zip(parts, weights, strict=True))
        pairs = zip(weights, features.tensors, strict=True)
        tensors = [(weight * (total / weighted)).to(x.dtype).expand_as(x).contiguous() for weight, x in pairs]
        return TensorTree(features.around(tensors), features.form)


def segment_means(squares: Float[Tensor, "rows ... channels"], width: int | None) -> Float[Tensor, "1 ... channels"]:
    """Mean over rows and over the channels of a segment, for every channel; the whole feature where it has no such parts."""
    by_channel = squares.mean(0, keepdim=True)
    if width is None or squares.shape[-1] % width:
        return by_channel.mean(-1, keepdim=True).expand_as(by_channel)
    return by_channel.unflatten(-1, (-1, width)).mean(-1).repeat_interleave(width, dim=-1)


@dataclass(frozen=True)
class Fisher(Objective):
    """Squared error weighted by the diagonal of the Fisher information at the unit's output (BRECQ, arXiv 2102.05426, eq. 10).

    A denoiser's likelihood is Gaussian around the predicted noise: labels drawn from the model are that noise plus standard
    normal v, and the gradient of the loss is J^T v with J the Jacobian from the unit's output to the prediction, whose square
    has the expectation diag(J^T J). One draw per sample. The release takes a softmax over the outputs, which means nothing for
    noise, and adds 1. A mean of 1 per unit keeps the balance with the rounding penalty. Units of timesteps alone have none.
    """

    seed: int = 0
    needs_network: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_fields(self, seed=SEED)

    def importance(self, network: nn.Module, units: Sequence[Unit], capture: Capture) -> Mapping[str, TensorTree]:
        return capture.squared_gradients(network, units, torch.Generator().manual_seed(self.seed))


@dataclass(frozen=True)
class Annealing:
    """Exponent beta of AdaRound's penalty: high (soft) at first, then linearly down (arXiv 2004.10568, 3.2).

    The penalty is off during the first `warmup` of the iterations (a share of them), so that the outputs are fitted first.
    """

    warmup: float
    start: float
    end: float

    def __post_init__(self) -> None:
        check_fields(self, warmup=DECAY, start=EXPONENT, end=EXPONENT)
        if self.end > self.start:
            raise ValueError(f"the exponent must fall from start to end, got {self.start} to {self.end}")

    def beta(self, count: int, iterations: int) -> float:
        """Exponent at iteration `count`, counted from 1."""
        begin = self.warmup * iterations
        if count < begin:
            return self.start
        return self.end + (self.start - self.end) * max(0.0, 1 - (count - begin) / (iterations - begin))

    def active(self, count: int, iterations: int) -> bool:
        """Whether the penalty is on at iteration `count`, counted from 1."""
        return count >= self.warmup * iterations

"""What reconstruction minimises: the error of a unit's outputs, and a penalty that makes the rounding decide."""

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor


def lp_loss(
    prediction: Float[Tensor, "batch *rest"], target: Float[Tensor, "batch *rest"], p: float, dim: int = 1
) -> Float[Tensor, ""]:
    """|prediction - target|^p summed over the channels (`dim`), averaged over everything else."""
    error = prediction - target
    power = error.square() if p == 2 else error.abs().pow(p)
    return power.mean() * target.shape[dim]


def channel_dim(x: Tensor) -> int:
    """Where the channels are: dimension 1 of feature maps and features, the last one of tokens.

    The releases sum over dimension 1 of tokens too, which ties the balance of the two terms to the resolution.
    """
    return 2 if x.dim() == 3 else 1


@dataclass(frozen=True)
class Annealing:
    """The exponent beta of AdaRound's penalty: high (soft) for a start, then linearly down (arXiv 2004.10568, 3.2).

    The penalty is off until `warmup` of the iterations have passed, so that the outputs are fitted first.
    """

    warmup: float
    start: float
    end: float

    def beta(self, count: int, iterations: int) -> float:
        """Exponent at iteration `count`, counted from 1."""
        begin = self.warmup * iterations
        if count < begin:
            return self.start
        return self.end + (self.start - self.end) * max(0.0, 1 - (count - begin) / (iterations - begin))

    def active(self, count: int, iterations: int) -> bool:
        """Whether the penalty counts at iteration `count`, counted from 1."""
        return count >= self.warmup * iterations

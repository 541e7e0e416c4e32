"""Parameterized Clipping Activation (PACT, arXiv 1805.06085)."""

from collections.abc import Mapping
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from tfmq_exp.quant.forms.base import Form, Grid, Levels
from tfmq_exp.quant.forms.lsq import Lsq
from tfmq_exp.quant.forms.stepped import Rule, stepped


@dataclass(frozen=True)
class Pact(Form):
    """The clip value alpha = s high learns from what is clipped alone, and shrinks under its L2 penalty.

    d/d alpha is 1 for x >= alpha, on a signed grid -1 for x <= -alpha, 0 elsewhere.
    """

    levels: Levels = "narrow"
    decay: float = 1e-4

    def __call__(
        self, x: Float[Tensor, "*shape"], scale: Tensor, grid: Grid, further: Mapping[str, Tensor]
    ) -> Float[Tensor, "*shape"]:
        """Values s round(clip(x / s))."""
        return stepped(x, scale, Rule(grid.low, grid.high, inside="none"))

    def settled(self) -> Lsq:
        """The grid alone."""
        return Lsq(self.levels)

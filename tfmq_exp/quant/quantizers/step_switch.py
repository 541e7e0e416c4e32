"""Step-aware mixed precision: other bit-widths at other sampling steps (PTQD, arXiv 2305.10657, section 3.4)."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from tfmq_exp.quant.quantizers.affine import AffineQuantizer
from tfmq_exp.quant.quantizers.base import Mode
from tfmq_exp.quant.timestep_context import TimestepContext


class StepSwitch(nn.Module):
    """Several quantizers of one activation, one of which acts at each step; the widest until a choice is made.

    Weights do not change with the step, so one copy of them serves all.
    """

    at: Tensor

    def __init__(self, choices: Sequence[AffineQuantizer], context: TimestepContext) -> None:
        super().__init__()
        self.choices, self.context = nn.ModuleList(choices), context
        self.bits = tuple(choice.spec.bits for choice in choices)
        widest = self.bits.index(max(self.bits))
        self.register_buffer("at", torch.full((context.num_steps,), widest), persistent=False)

    def use(self, bits: Sequence[int]) -> None:
        """Set the bit-width of every step. Raises ValueError for a width that is not among the choices, or too few."""
        if len(bits) != self.context.num_steps:
            raise ValueError(f"{self.context.num_steps} steps need as many bit-widths, got {len(bits)}")
        if wrong := set(bits).difference(self.bits):
            raise ValueError(f"no quantizer has {min(wrong)} bits; there are {', '.join(map(str, self.bits))}")
        self.at.copy_(torch.tensor([self.bits.index(b) for b in bits]))

    def forward(self, x: Float[Tensor, "batch *rest"]) -> Float[Tensor, "batch *rest"]:
        """Quantize each row with the choice of its step; while the choices observe, give `x` to all of them."""
        if any(choice.mode is not Mode.QUANTIZE for choice in self.choices):
            for choice in self.choices:
                choice(x)
            return x
        chosen = self.at[self.context.index]
        used: list[int] = sorted({int(i) for i in chosen})
        if len(used) == 1:
            return self.choices[used[0]](x)
        rows, out = chosen.reshape(-1, *(1,) * (x.dim() - 1)), x
        for i in used:
            out = torch.where(rows == i, self.choices[i](x), out)
        return out

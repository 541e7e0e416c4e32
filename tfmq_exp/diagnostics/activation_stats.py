"""What is seen of one activation during one network call, batch after batch, in bounded memory."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tfmq_exp.core.finite import require_finite
from tfmq_exp.quant.spec import QParams, QuantSpec


@dataclass
class ActivationStats:
    """Extremes, moments, a random sample for quantiles, and how the quantizer fits.

    Args:
        spec: the quantizer's grid.
        extremes: smallest and largest value.
        sums: of the values, of their squares, their count, and how many lie outside the grid; double precision.
        reach: smallest and largest number that the grid holds (at run-time ranges: over all rows).
        interval: sum of the scale over rows, and the number of rows.
        drawn: values that quantiles are taken from.
    """

    spec: QuantSpec
    extremes: list[float] = field(default_factory=lambda: [torch.inf, -torch.inf])
    sums: list[float] = field(default_factory=lambda: [0.0] * 4)
    reach: list[float] = field(default_factory=lambda: [torch.inf, -torch.inf])
    interval: list[float] = field(default_factory=lambda: [0.0, 0.0])
    drawn: list[Tensor] = field(default_factory=list)

    def add(self, x: Tensor, q: QParams, values: int, generator: torch.Generator) -> None:
        """Look at a batch under its scale and zero point; `values` of it at most are kept, drawn with replacement.

        Raises:
            NotFiniteError: a value that is not finite, which no comparison would show.
        """
        x, spec = x.detach().float(), self.spec
        require_finite(torch.stack(x.aminmax()), "an activation while sampling")
        codes = (x / q.scale).round_().add_(q.zero_point)
        outside = (codes < spec.qmin).logical_or_(codes > spec.qmax).sum()
        squares = x.square().sum(dtype=torch.float64)
        for i, value in enumerate((x.sum(dtype=torch.float64), squares, x.numel(), outside)):
            self.sums[i] += float(value)
        _widen(self.extremes, x, x)
        _widen(self.reach, q.scale * (spec.qmin - q.zero_point), q.scale * (spec.qmax - q.zero_point))
        self.interval[0] += float(q.scale.sum())
        self.interval[1] += q.scale.numel()
        flat = x.flatten()
        if flat.numel() > values:
            flat = flat[torch.randint(flat.numel(), (values,), generator=generator).to(x.device)]
        self.drawn.append(flat.cpu())

    def columns(self) -> dict[str, Any]:
        """Everything as numbers."""
        total, squares, count, outside = self.sums
        mean = total / count
        low, high = torch.cat(self.drawn).quantile(torch.tensor([0.01, 0.99])).tolist()
        return {
            "min": self.extremes[0],
            "q01": low,
            "mean": mean,
            "q99": high,
            "max": self.extremes[1],
            "std": max(0.0, squares / count - mean**2) ** 0.5,
            "grid_min": self.reach[0],
            "grid_max": self.reach[1],
            "interval": self.interval[0] / self.interval[1],
            "clipped": outside / count,
        }


def _widen(ends: list[float], low: Tensor, high: Tensor) -> None:
    ends[:] = min(ends[0], float(low.min())), max(ends[1], float(high.max()))

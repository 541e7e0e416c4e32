"""Statistics of one activation during one network call, batch after batch, in bounded memory."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tfmq_exp.finite import require_finite
from tfmq_exp.quant.spec import QParams, QuantSpec


@dataclass
class ActivationStats:
    """Extremes, moments, a random sample for quantiles, and how the quantizer's grid fits.

    Args:
        spec: the quantizer's grid.
        batches: of each batch the extremes; sums of the values and of their squares, their count, and how many are outside
            the grid; ends of the grid over all rows; the sum of the scale over rows, and the number of rows.
        drawn: values that quantiles are computed of.
    """

    spec: QuantSpec
    batches: list[list[float]] = field(default_factory=list)
    drawn: list[Tensor] = field(default_factory=list)

    def add(self, x: Tensor, q: QParams, max_values: int, generator: torch.Generator) -> None:
        """Add a batch.

        Args:
            x: the values.
            q: scale and zero point that the quantizer has for them.
            max_values: how many of them are kept at most, drawn with replacement.
            generator: draws them.

        Raises:
            NotFiniteError: a value that is not finite, which no comparison would show.
        """
        x, qmin, qmax = x.detach().float(), self.spec.qmin, self.spec.qmax
        low, high = x.aminmax()
        require_finite(torch.stack([low, high]), "an activation while sampling")
        codes = (x / q.scale).round_().add_(q.zero_point)
        outside = (codes < qmin).logical_or_(codes > qmax).sum()
        ends = (q.scale * (qmin - q.zero_point)).min(), (q.scale * (qmax - q.zero_point)).max()
        moments = x.sum(dtype=torch.float64), x.square().sum(dtype=torch.float64)
        row = (low, high, *moments, outside, *ends, q.scale.sum())
        self.batches.append([*torch.stack([value.double() for value in row]).tolist(), x.numel(), q.scale.numel()])
        values = x.flatten()
        if values.numel() > max_values:
            values = values[torch.randint(values.numel(), (max_values,), generator=generator).to(x.device)]
        self.drawn.append(values.cpu())

    def columns(self) -> dict[str, Any]:
        """All statistics, by the names of the table's columns."""
        low, high, total, squares, outside, grid_low, grid_high, scale, count, rows = zip(*self.batches, strict=True)
        mean = sum(total) / sum(count)
        q01, q99 = torch.cat(self.drawn).quantile(torch.tensor([0.01, 0.99])).tolist()
        return {
            **{"min": min(low), "q01": q01, "mean": mean, "q99": q99, "max": max(high)},
            "std": max(0.0, sum(squares) / sum(count) - mean**2) ** 0.5,
            **{"grid_min": min(grid_low), "grid_max": max(grid_high)},
            "interval": sum(scale) / sum(rows),
            "clipped": sum(outside) / sum(count),
        }

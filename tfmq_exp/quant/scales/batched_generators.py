"""The networks of many generated intervals, evaluated together: a few batched products in place of hundreds of small ones."""

from collections.abc import Generator, Sequence
from contextlib import contextmanager

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from tfmq_exp.quant.scales.tdq import Generated, intervals


class BatchedGenerators:
    """Evaluates the networks of all sources at the timesteps of a batch, which need not be of the finite set.

    While learning, timesteps are drawn from all training timesteps; a table of them all would be evaluated for a few rows.
    The sources keep their parameters, so what trains, saves or merges one of them need not know of the bank. Networks of one
    shape that read one encoding are stacked, layer by layer.

    Args:
        sources: in any order; none may be missing that shall follow the timestep of a batch exactly.
    """

    def __init__(self, sources: Sequence[Generated]) -> None:
        groups: dict[object, list[Generated]] = {}
        for source in sources:
            groups.setdefault((source.encoding, source.hidden, dropout_of(source)), []).append(source)
        self.groups = list(groups.values())

    def scales(self, t: Int[Tensor, "rows"]) -> list[tuple[Generated, Float[Tensor, "rows"]]]:
        """Every source with its interval for each timestep."""
        # half precision would move an interval by more than it is learned to differ between timesteps
        with torch.autocast(t.device.type, enabled=False):
            return [pair for group in self.groups for pair in zip(group, evaluated(group, t).unbind(), strict=True)]

    @contextmanager
    def at(self, t: Int[Tensor, "batch"]) -> Generator[None]:
        """Give every source the intervals of a batch for the duration of a forward pass."""
        given = self.scales(t)
        for source, rows in given:
            source.rows = rows
        try:
            yield
        finally:
            for source, _ in given:
                source.rows = None


def dropout_of(source: Generated) -> float:
    """The share of the last hidden layer that is dropped."""
    return next(layer.p for layer in source.mlp if isinstance(layer, nn.Dropout))


def evaluated(group: Sequence[Generated], t: Int[Tensor, "rows"]) -> Float[Tensor, "sources rows"]:
    """Intervals of sources whose networks have the same layers."""
    first = group[0]
    hidden = first.encoding(t).expand(len(group), -1, -1)
    for i, layer in enumerate(first.mlp):
        if isinstance(layer, nn.Linear):
            layers: list[nn.Linear] = [source.mlp[i] for source in group]  # type: ignore[misc]
            weight = torch.stack([each.weight for each in layers])
            bias = torch.stack([each.bias for each in layers])
            hidden = torch.baddbmm(bias[:, None], hidden, weight.mT)
        else:
            hidden = layer(hidden)
    return intervals(torch.stack([source.scale for source in group]), hidden.squeeze(2))

"""The Temporal Information Block (TFMQ-DM, arXiv 2311.16503, section 4.1): all that depends on the timestep alone.

In many networks that is the timestep with a pooled condition: a class, a pooled text, a guidance scale, a size. Their features are
finite for the pairs of timestep and condition that occur.
"""

from collections.abc import Collection, Mapping
from contextlib import ExitStack
from typing import Any
from unittest.mock import patch

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from tfmq_exp.denoisers.families.family import layer_names
from tfmq_exp.denoisers.families.find import family_of
from tfmq_exp.denoisers.read_structure import after_each
from tfmq_exp.denoisers.structure import NetworkStructure, Role


class TemporalInformationBlock(nn.Module):
    """(t, conditions) -> the temporal features: what blocks add or multiply before they see any sample.

    A view: it calls the network's own layers and owns none, so it is bit-equal to the features inside the network, before and
    after quantization. Build it from the present network: it does not follow later replacements of layers.

    Args:
        network: of a known family.
        structure: of the network.
        layers: that return features, of those in blocks of their own; None for all features.
    """

    def __init__(self, network: nn.Module, structure: NetworkStructure, layers: Collection[str] | None = None) -> None:
        super().__init__()
        self.network, self.family, self.layers = network, family_of(network), layers
        every = tuple(layer.name for layer in structure.by_role(Role.TIME_PROJ))
        self.names = every if layers is None else tuple(name for name in every if name in layers)

    def features(
        self, t: Shaped[Tensor, "rows"], conditions: Mapping[str, Tensor] | None = None
    ) -> dict[str, Float[Tensor, "rows ..."]]:
        """The features by the names of the layers that return them; channel counts differ.

        Args:
            t: timesteps as the network is given them.
            conditions: rows of the arguments in `family.conditions`, of those that the network takes.
        """
        found = self.family.features(self.network, self.names, t, conditions or {})
        return found if self.layers is None else {name: found[name] for name in self.names}

    def forward(
        self, t: Shaped[Tensor, "rows"], conditions: Mapping[str, Tensor] | None = None
    ) -> tuple[Float[Tensor, "rows ..."], ...]:
        """The features alone, in the order of `features`."""
        return tuple(self.features(t, conditions).values())


class TemporalEmbedding(TemporalInformationBlock):
    """(t, conditions) -> what the layers that return temporal features read, and features that no such layer returns."""

    def forward(
        self, t: Shaped[Tensor, "rows"], conditions: Mapping[str, Tensor] | None = None
    ) -> tuple[Float[Tensor, "rows ..."], ...]:
        """Each different tensor once."""
        with ExitStack() as patches:
            for name in self.names:
                patches.enter_context(patch.object(self.network.get_submodule(name), "forward", lambda x: x))
            found = self.features(t, conditions).values()
        return tuple({id(x): x for x in found}.values())


def temporal_pairs(
    t: Shaped[Tensor, "steps"], conditions: Mapping[str, Tensor]
) -> tuple[Shaped[Tensor, "rows"], dict[str, Tensor]]:
    """Every timestep with every row of some conditions, timesteps first; the timesteps alone without conditions."""
    count = len(next(iter(conditions.values()), t[:1]))
    given = {name: value.repeat(len(t), *[1] * (value.dim() - 1)) for name, value in conditions.items()}
    return t.repeat_interleave(count), given


def distinct(conditions: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Conditions without those that came before, in their order."""
    if not conditions:
        return {}
    joined = torch.cat([value.double().reshape(len(value), -1) for value in conditions.values()], dim=1)
    kind: Tensor = joined.unique(dim=0, return_inverse=True)[1]
    places = torch.arange(len(kind), device=kind.device)
    first = torch.full((int(kind.max()) + 1,), len(kind), device=kind.device).scatter_reduce(0, kind, places, "amin")
    return {name: value[first.sort().values] for name, value in conditions.items()}


def measured_temporal_layers(
    network: nn.Module, example: Mapping[str, Any], t: float, other_t: float, conditions: tuple[str, ...] = ()
) -> set[str]:
    """Layers that depend on t, and on nothing else but some conditions, by measurement.

    Their output is the same for other inputs, and another for another t.

    Args:
        network: to measure.
        example: keyword arguments of a forward pass.
        t: a timestep.
        other_t: another one.
        conditions: names of the arguments that a layer may depend on, too.
    """
    layers, generator = layer_names(network), torch.Generator().manual_seed(0)

    def run(inputs: Mapping[str, Any]) -> dict[str, Tensor]:
        outputs: dict[str, Tensor] = {}
        with after_each(network, layers, lambda name, _module, _args, output: outputs.update({name: output})):
            network(**inputs)
        return outputs

    def moved(name: str, value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: moved(f"{name}.{key}", part) for key, part in value.items()}
        if not isinstance(value, Tensor) or not value.is_floating_point() or name in ("timestep", *conditions):
            return value
        return value + torch.randn(value.shape, generator=generator).to(value)

    kind = torch.float32 if isinstance(t, float) else torch.int64
    now, later = ({"timestep": torch.full_like(example["timestep"], time, dtype=kind)} for time in (t, other_t))
    others = {name: moved(name, value) for name, value in example.items()}
    first, other_inputs, other_time = run({**example, **now}), run({**others, **now}), run({**example, **later})
    return {
        name
        for name, output in first.items()
        if torch.equal(output, other_inputs[name]) and not torch.equal(output, other_time[name])
    }

"""Temporal features of the quantized network: computed by its layers, or cached for every sampling step."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from tfmq_exp.core.validate import COUNT, Kind, check_fields, one_of, optional, whole
from tfmq_exp.denoisers.structure import NetworkStructure, Role
from tfmq_exp.denoisers.temporal import TemporalInformationBlock, temporal_pairs
from tfmq_exp.quant.layers import cached
from tfmq_exp.quant.timestep_context import exact_timesteps, network_timesteps
from tfmq_exp.surgery.quantized_network import QuantizedNetwork

BITS = Kind("a whole number from 2 to 8", lambda value: whole(value) and 2 <= value <= 8)
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ComputeFeatures:
    """The quantized Temporal Information Block computes them at every step (TFMQ-DM and everything before it)."""

    def __call__(
        self,
        model: QuantizedNetwork,
        float_network: nn.Module,
        structure: NetworkStructure,
        conditions: Mapping[str, Tensor] | None = None,
    ) -> None: ...


@dataclass(frozen=True)
class CacheFeatures:
    """Store the float features of every sampling step in quantized form (Temporal Feature Matters, arXiv 2407.19547).

    The paper's text was not at hand. Assumed: one min-max grid per step and layer, at the activations' bit-width; and
    "disturbance-aware selection" keeps, layer by layer, whichever of the stored feature and the quantized block's own has the
    smaller mean relative error over the finite set. When no layer computes its feature any more, the time embedding
    goes too.
    """

    bits: int  # of a stored feature
    select: Literal["disturbance", "always"]  # `disturbance` for the selection, `always` to store every feature
    # that share a range; None for all of a feature. A transformer's width gives shifts, scales and gates ranges of their own
    channels: int | None = None

    def __post_init__(self) -> None:
        check_fields(self, bits=BITS, select=one_of("disturbance", "always"), channels=optional(COUNT))

    @torch.no_grad()
    def __call__(
        self,
        model: QuantizedNetwork,
        float_network: nn.Module,
        structure: NetworkStructure,
        conditions: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Replace the layers that return features, as chosen.

        Args:
            model: the quantized network.
            float_network: whose features are stored.
            structure: of both.
            conditions: rows of the arguments that features depend on beside the timestep.

        Raises:
            ValueError: features that differ between these rows: a table by timestep cannot hold them.
        """
        rows = conditions or {}
        if varied := [name for name, value in rows.items() if not bool((value == value[:1]).all())]:
            raise ValueError(
                f"temporal features of a {type(model.network).__name__} depend on {', '.join(varied)}, too: a table by timestep "
                "cannot hold them (method/temporal=compute computes them)"
            )
        one = {name: value[:1] for name, value in rows.items()}
        steps = network_timesteps(exact_timesteps(model.context.timesteps)).to(next(float_network.parameters()).device)
        t, given = temporal_pairs(steps, one)
        with model.context.at(t):
            computed = TemporalInformationBlock(model.network, structure).features(t, given)
        exact, stored = TemporalInformationBlock(float_network, structure).features(t, given), set[str]()
        for layer, feature in exact.items():
            table = cached(feature, self.bits, self.channels)
            kept = table.dequantize().reshape(feature.shape)
            if self.select == "always" or disturbance(kept, feature) < disturbance(computed[layer], feature):
                model.cache_feature(layer, table)
                stored.add(layer)
        log.info("%d of %d temporal features are stored", len(stored), len(exact))
        if len(stored) == len(exact):
            for layer in structure.by_role(Role.TIME_EMBED):
                if layer.name not in stored:
                    model.drop(layer.name)


def disturbance(feature: Tensor, exact: Tensor) -> Tensor:
    """Mean over the timesteps of a feature's squared error relative to the exact one."""
    return ((feature - exact).square().mean(1) / exact.square().mean(1)).mean()

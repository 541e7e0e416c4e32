"""Temporal features of the quantized network: computed by its layers, or stored for the finite set of steps and conditions."""

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from tfmq_exp.core.validate import BYTES, COUNT, INNER_SHARE, Kind, check_fields, one_of, optional, whole
from tfmq_exp.denoisers.structure import NetworkStructure, Role
from tfmq_exp.denoisers.temporal import TemporalInformationBlock, distinct, temporal_pairs
from tfmq_exp.quant.condition_set import ConditionSet
from tfmq_exp.quant.stored_features import CachedFeature, StoredFeature, cached, fitted_basis
from tfmq_exp.quant.timestep_context import Timestep, TimestepContext, exact_timesteps, network_timesteps
from tfmq_exp.surgery.quantized_network import QuantizedNetwork

BITS = Kind("a whole number from 2 to 8", lambda value: whole(value) and 2 <= value <= 8)
Select = Literal["disturbance", "always"]  # `disturbance` for the selection, `always` to store every feature
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class FeatureInputs:
    """Timesteps and conditions that temporal features depend on in a run.

    Args:
        conditions: rows of the network's arguments that features depend on beside the timestep: all that are sampled.
        calls: number of steps -> the timesteps that the run's sampler visits with so many.
    """

    conditions: Mapping[str, Tensor] = field(default_factory=dict)
    calls: Callable[[int], Sequence[Timestep]] = lambda _: ()


@dataclass(frozen=True)
class ComputeFeatures:
    """The quantized Temporal Information Block computes them at every step (TFMQ-DM and everything before it)."""

    stores: ClassVar[bool] = False  # features, of conditions that the run must name

    def __call__(
        self,
        model: QuantizedNetwork,
        float_network: nn.Module,
        structure: NetworkStructure,
        inputs: FeatureInputs | None = None,
    ) -> None: ...


class StoreFeatures(ABC):
    """Store the float features, layer by layer, where that disturbs less than the quantized layer does.

    When no layer computes its feature any more, the embeddings of time and conditions go, too.
    """

    stores: ClassVar[bool] = True
    select: Select
    max_bytes: int | None

    def timesteps(self, model: QuantizedNetwork, inputs: FeatureInputs) -> Sequence[Timestep]:
        """Timesteps at which the float features are stored; the finite set."""
        return model.context.timesteps

    @abstractmethod
    def stored(
        self, features: Float[Tensor, "steps conditions channels"], t: Tensor, context: TimestepContext
    ) -> StoredFeature:
        """A feature as it is stored, from its values at these timesteps."""

    @torch.no_grad()
    def __call__(
        self,
        model: QuantizedNetwork,
        float_network: nn.Module,
        structure: NetworkStructure,
        inputs: FeatureInputs | None = None,
    ) -> None:
        """Replace the layers that return features, as chosen.

        Args:
            model: the quantized network.
            float_network: whose features are stored.
            structure: of both.
            inputs: conditions of the run, and its sampler's timesteps.

        Raises:
            ValueError: features that are tables themselves, or a budget that no stored feature fits into.
        """
        inputs, context = inputs or FeatureInputs(), model.context
        rows, device = distinct(inputs.conditions), next(float_network.parameters()).device
        count = len(next(iter(rows.values()), torch.zeros(1)))
        context.conditions = ConditionSet(rows) if count > 1 else None
        block = TemporalInformationBlock(float_network, structure)
        at = network_timesteps(exact_timesteps(self.timesteps(model, inputs))).to(device)
        features = block.features(*temporal_pairs(at, rows))
        if tables := [layer for layer, feature in features.items() if feature.dim() > 2]:
            raise ValueError(
                f"{tables[0]} returns a table of features, which cannot be stored: method/temporal=compute"
            )
        found = {layer: self.stored(x.unflatten(0, (-1, count)), at, context) for layer, x in features.items()}
        t, given = temporal_pairs(network_timesteps(exact_timesteps(context.timesteps)).to(device), rows)
        exact = block.features(t, given)
        with context.at(t, conditions=given):
            computed = TemporalInformationBlock(model.network, structure).features(t, given)
            gains = {
                layer: float(disturbance(computed[layer], x) - disturbance(found[layer].to(device)(x), x))
                for layer, x in exact.items()
            }
        chosen = self.within_budget({layer: found[layer] for layer in exact}, gains)
        for layer in chosen:
            model.replace_layer(layer, found[layer])
        if len(chosen) == len(exact):
            drop_embeddings(model, structure)
        if not chosen:  # then any condition may be asked for
            context.conditions = None
        size, instead = sum(found[layer].size for layer in chosen), model.replaced_weights
        log.info(
            "%d of %d temporal features are stored for %d steps and %d conditions, in %d bytes instead of %d weights",
            *(len(chosen), len(exact), context.num_steps, count, size, instead),
        )

    def within_budget(self, found: Mapping[str, StoredFeature], gains: Mapping[str, float]) -> list[str]:
        """Layers whose features are stored: those that disturb less, of these the ones that gain most for a byte."""
        useful = [layer for layer in found if self.select == "always" or gains[layer] > 0]
        if self.max_bytes is None or sum(found[layer].size for layer in useful) <= self.max_bytes:
            return useful
        smallest = min(found[layer].size for layer in useful)
        if smallest > self.max_bytes:
            raise ValueError(
                f"max_bytes must be at least {smallest}, the smallest stored feature, got {self.max_bytes}"
            )
        kept, left = set[str](), self.max_bytes
        for layer in sorted(useful, key=lambda layer: gains[layer] / found[layer].size, reverse=True):
            if found[layer].size <= left:
                kept.add(layer)
                left -= found[layer].size
        return [layer for layer in useful if layer in kept]


@dataclass(frozen=True)
class CacheFeatures(StoreFeatures):
    """A table of every feature by step and condition (Temporal Feature Matters, arXiv 2407.19547).

    The paper's text was not at hand. Assumed: one min-max grid per step and layer, at the activations' bit-width; and
    "disturbance-aware selection" keeps, layer by layer, whichever of the stored feature and the quantized block's own has the
    smaller mean relative error over the finite set.
    """

    bits: int  # of a stored feature
    select: Select
    # that share a range; None for all of a feature. A transformer's width gives shifts, scales and gates ranges of their own
    channels: int | None = None
    max_bytes: int | None = None  # of all tables; None for no limit

    def __post_init__(self) -> None:
        check_fields(self, bits=BITS, select=one_of("disturbance", "always"), channels=optional(COUNT))
        check_fields(self, max_bytes=optional(BYTES))

    def stored(self, features: Tensor, t: Tensor, context: TimestepContext) -> StoredFeature:
        return CachedFeature(cached(features.flatten(0, 1), self.bits, self.channels), context)


@dataclass(frozen=True)
class BasisFeatures(StoreFeatures):
    """A mean and a few vectors for each feature, with coefficients over time that serve timesteps in between, too.

    Principal components of the feature's curve over time and conditions; the rank is given, or the smallest one within a
    tolerance. Coefficients stand at the finite set, and at the timesteps that the same sampler visits with `points` steps.
    """

    bits: int  # of the mean and the vectors; coefficients are float32
    select: Select
    tolerance: float = 1e-4  # squared error of the real vectors over the feature's squares, where no rank is given
    rank: int | None = None  # number of vectors
    points: int | None = None  # None: the finite set alone
    max_bytes: int | None = None  # of all bases; None for no limit

    def __post_init__(self) -> None:
        check_fields(self, bits=BITS, select=one_of("disturbance", "always"), tolerance=INNER_SHARE)
        check_fields(self, rank=optional(COUNT), points=optional(COUNT), max_bytes=optional(BYTES))

    def timesteps(self, model: QuantizedNetwork, inputs: FeatureInputs) -> Sequence[Timestep]:
        dense = inputs.calls(self.points) if self.points else ()
        return sorted({*model.context.timesteps, *dense})

    def stored(self, features: Tensor, t: Tensor, context: TimestepContext) -> StoredFeature:
        return fitted_basis(features, t, context, bits=self.bits, rank=self.rank, tolerance=self.tolerance)


def drop_embeddings(model: QuantizedNetwork, structure: NetworkStructure) -> None:
    """Take out the embeddings of time and conditions, which nothing reads where all features are stored."""
    kept = model.stored_features
    tables = [name for name, module in model.network.named_modules() if isinstance(module, nn.Embedding)]
    layers = [layer.name for layer in structure.by_role(Role.TIME_EMBED, Role.CONDITION_EMBED)]
    for name in dict.fromkeys([*layers, *tables]):
        if name not in kept:
            model.replace_layer(name, None)


def disturbance(feature: Tensor, exact: Tensor) -> Tensor:
    """Mean over timesteps and conditions of a feature's squared error relative to the exact one."""
    return ((feature - exact).square().mean(1) / exact.square().mean(1)).mean()

"""Units of reconstruction, and partitions of a network into them."""

from collections.abc import Callable
from dataclasses import dataclass
from operator import methodcaller
from typing import Literal

from torch import nn

from tfmq_exp.denoisers.structure import TEMPORAL_ROLES, Kind, UNetStructure
from tfmq_exp.denoisers.temporal import TemporalInformationBlock


@dataclass(frozen=True)
class Unit:
    """A part of the network that is reconstructed as a whole."""

    name: str
    kind: Kind
    # names of the layers whose rounding it learns. A unit may run layers that it does not learn.
    sites: tuple[str, ...]
    # source of its inputs: passes of the denoiser over the calibration set, or the sampler's timesteps alone
    driver: Literal["denoiser", "timesteps"]
    # network -> the unit's module in it (in the float one for targets, in the quantized one for learning)
    module: Callable[[nn.Module], nn.Module]


# (structure, names of learnable layers) -> units whose layers are disjoint, each with something to learn
Partition = Callable[[UNetStructure, frozenset[str]], list[Unit]]


@dataclass(frozen=True)
class Blockwise:
    """Every block with all its layers, in execution order (BRECQ): an embedding projection is learned inside its block."""

    def __call__(self, structure: UNetStructure, learnable: frozenset[str]) -> list[Unit]:
        parts = [(block, tuple(site for site in block.sites if site in learnable)) for block in structure.blocks]
        return [
            Unit(block.name, block.kind, sites, "denoiser", methodcaller("get_submodule", block.name))
            for block, sites in parts
            if sites
        ]


@dataclass(frozen=True)
class TemporalFrozen:
    """Blocks without their temporal layers, which no unit learns: "Freeze" of TFMQ-DM's table 1."""

    def __call__(self, structure: UNetStructure, learnable: frozenset[str]) -> list[Unit]:
        rest = frozenset(site for site in learnable if structure.sites[site].role not in TEMPORAL_ROLES)
        return Blockwise()(structure, rest)


@dataclass(frozen=True)
class TemporalAware:
    """Temporal Information Aware Reconstruction (TIAR, TFMQ-DM, arXiv 2311.16503, section 4.2).

    The Temporal Information Block is a unit of its own, learned first and from the sampler's timesteps alone; the other
    blocks are reconstructed without touching their embedding projections.
    """

    def __call__(self, structure: UNetStructure, learnable: frozenset[str]) -> list[Unit]:
        def module(unet: nn.Module) -> nn.Module:
            return TemporalInformationBlock(unet, structure)

        temporal = tuple(site for site in structure.temporal_sites if site in learnable)
        first = Unit("temporal_information_block", Kind.TEMPORAL, temporal, "timesteps", module)
        return [*([first] if temporal else []), *TemporalFrozen()(structure, learnable)]


@dataclass(frozen=True)
class SingleUnit:
    """One unit of a partition, for `debug=overfit`; all other layers stay float, so the network is not finished."""

    partition: Partition  # cuts the network into units
    unit: str | None = None  # name of the one; None: the one with the most layers, the first of them

    def __call__(self, structure: UNetStructure, learnable: frozenset[str]) -> list[Unit]:
        """The unit by itself; ValueError where there is none of that name."""
        units = self.partition(structure, learnable)
        if self.unit is None:
            return [max(units, key=lambda unit: len(unit.sites))]
        if chosen := [unit for unit in units if unit.name == self.unit]:
            return chosen
        raise ValueError(f"unit must be one of {', '.join(unit.name for unit in units)}, got {self.unit!r}")

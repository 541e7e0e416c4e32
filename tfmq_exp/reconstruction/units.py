"""How a network is cut into the units that are reconstructed one after the other."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from torch import nn

from tfmq_exp.denoisers.structure import TEMPORAL_ROLES, Kind, UNetStructure
from tfmq_exp.denoisers.temporal import TemporalInformationBlock


@dataclass(frozen=True)
class Unit:
    """A part of the network that is reconstructed as a whole.

    Args:
        sites: layers whose rounding it learns. A unit may run layers that it does not learn.
        driver: what its inputs are: captured while the denoiser runs, or the sampler's timesteps themselves.
        module: the unit in a given network (the float one for targets, the quantized one for learning).
    """

    name: str
    kind: Kind
    sites: tuple[str, ...]
    driver: Literal["denoiser", "timesteps"]
    module: Callable[[nn.Module], nn.Module]


def unit_of(name: str, kind: Kind, sites: tuple[str, ...]) -> Unit:
    """A unit that is a submodule of the network."""
    return Unit(name, kind, sites, "denoiser", lambda unet: unet.get_submodule(name))


@dataclass(frozen=True)
class Blockwise:
    """Every block with all its layers, in execution order (BRECQ): an embedding projection is learned inside its block."""

    def __call__(self, structure: UNetStructure, learnable: frozenset[str]) -> list[Unit]:
        """Units that have something to learn; their sites are disjoint and cover `learnable`."""
        units = [
            unit_of(b.name, b.kind, tuple(site for site in b.sites if site in learnable)) for b in structure.blocks
        ]
        return [unit for unit in units if unit.sites]


@dataclass(frozen=True)
class TemporalFrozen:
    """Blocks without their temporal layers, which no unit learns: "Freeze" of TFMQ-DM's table 1."""

    def __call__(self, structure: UNetStructure, learnable: frozenset[str]) -> list[Unit]:
        """Units that have something to learn; their sites are disjoint and cover what is not temporal of `learnable`."""
        return Blockwise()(structure, not_temporal(structure, learnable))


@dataclass(frozen=True)
class TemporalAware:
    """Temporal Information Aware Reconstruction (TIAR, TFMQ-DM, arXiv 2311.16503, section 4.2).

    The Temporal Information Block is a unit of its own, learned first and from the sampler's timesteps alone; the other
    blocks are reconstructed without touching their embedding projections.
    """

    def __call__(self, structure: UNetStructure, learnable: frozenset[str]) -> list[Unit]:
        """Units that have something to learn; their sites are disjoint and cover `learnable`."""
        temporal = tuple(site for site in structure.temporal_sites if site in learnable)
        first = Unit(
            "temporal_information_block",
            Kind.TEMPORAL,
            temporal,
            "timesteps",
            lambda unet: TemporalInformationBlock(unet, structure),
        )
        return [*([first] if temporal else []), *Blockwise()(structure, not_temporal(structure, learnable))]


def not_temporal(structure: UNetStructure, sites: frozenset[str]) -> frozenset[str]:
    """Without the time embedding and its projections."""
    return frozenset(site for site in sites if structure.sites[site].role not in TEMPORAL_ROLES)

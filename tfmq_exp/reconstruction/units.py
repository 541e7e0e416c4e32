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
    """A part of the network that is reconstructed as a whole.

    Args:
        layers: names of the layers whose rounding it learns. A unit may run layers that it does not learn.
        driver: source of its inputs: passes of the denoiser over the calibration set, or the sampler's timesteps alone.
        module: network -> the unit's module in it (in the float one for targets, in the quantized one for learning).
    """

    name: str
    kind: Kind
    layers: tuple[str, ...]
    driver: Literal["denoiser", "timesteps"]
    module: Callable[[nn.Module], nn.Module]


# (structure, names of learnable layers) -> units whose layers are disjoint, each with something to learn
Partition = Callable[[UNetStructure, frozenset[str]], list[Unit]]


@dataclass(frozen=True)
class Blockwise:
    """Every block with all its layers, in execution order (BRECQ): an embedding projection is learned inside its block."""

    def __call__(self, structure: UNetStructure, learnable: frozenset[str]) -> list[Unit]:
        units: list[Unit] = []
        for block in structure.blocks:
            if layers := tuple(layer for layer in block.layers if layer in learnable):
                units.append(
                    Unit(block.name, block.kind, layers, "denoiser", methodcaller("get_submodule", block.name))
                )
        return units


@dataclass(frozen=True)
class TemporalFrozen:
    """Blocks without their temporal layers, which no unit learns: "Freeze" of TFMQ-DM's table 1."""

    def __call__(self, structure: UNetStructure, learnable: frozenset[str]) -> list[Unit]:
        rest = frozenset(layer for layer in learnable if structure.layers[layer].role not in TEMPORAL_ROLES)
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

        temporal = tuple(layer for layer in structure.temporal_layers if layer in learnable)
        first = Unit("temporal_information_block", Kind.TEMPORAL, temporal, "timesteps", module)
        return [*([first] if temporal else []), *TemporalFrozen()(structure, learnable)]

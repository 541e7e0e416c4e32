"""Units of reconstruction: partitions of a network into them, and the inputs that they learn on."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from operator import methodcaller
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from tfmq_exp.core.validate import SHARE, check_fields
from tfmq_exp.denoisers.structure import TEMPORAL_INFORMATION, Kind, NetworkStructure, Role
from tfmq_exp.denoisers.temporal import TemporalEmbedding, TemporalInformationBlock
from tfmq_exp.quant.quantizers import Quantizer

MOST_TEMPORAL = (
    2**29
)  # weights of a Temporal Information Block that are learned together: 24 GB, at 44 bytes for a weight


@dataclass(frozen=True)
class Unit:
    """A part of the network that is reconstructed as a whole."""

    name: str
    kind: Kind
    layers: tuple[str, ...]  # layers whose rounding it learns; it may run others
    # source of its inputs: passes of the denoiser over the calibration set, or the sampler's timesteps alone, with the
    # conditions of the set where temporal features depend on these, too
    driver: Literal["denoiser", "timesteps"]
    # network -> the unit's module in it (in the float one for targets, in the quantized one for learning)
    module: Callable[[nn.Module], nn.Module]


# (structure, names of learnable layers) -> units whose layers are disjoint, each with something to learn
Partition = Callable[[NetworkStructure, frozenset[str]], list[Unit]]


@dataclass(frozen=True)
class Blockwise:
    """Every block with all its layers, in execution order (BRECQ): an embedding projection is learned inside its block."""

    def __call__(self, structure: NetworkStructure, learnable: frozenset[str]) -> list[Unit]:
        parts = [(block, tuple(layer for layer in block.layers if layer in learnable)) for block in structure.blocks]
        return [
            Unit(block.name, block.kind, layers, "denoiser", methodcaller("get_submodule", block.name))
            for block, layers in parts
            if layers
        ]


@dataclass(frozen=True)
class TemporalFrozen:
    """Blocks without their temporal layers, which no unit learns: "Freeze" of TFMQ-DM's table 1."""

    def __call__(self, structure: NetworkStructure, learnable: frozenset[str]) -> list[Unit]:
        rest = frozenset(layer for layer in learnable if structure.layers[layer].role not in TEMPORAL_INFORMATION)
        return Blockwise()(structure, rest)


@dataclass(frozen=True)
class TemporalAware:
    """Temporal Information Aware Reconstruction (TIAR, TFMQ-DM, arXiv 2311.16503, section 4.2).

    The Temporal Information Block is a unit of its own, learned first and from the sampler's timesteps alone (from the pairs of
    timestep and condition in the calibration set, where features depend on both); the other blocks are reconstructed without
    touching their embedding projections. All features count alike, whatever a block does with them.

    A Temporal Information Block of more than `MOST_TEMPORAL` weights (SD3, FLUX.1, Qwen-Image) is learned in parts: its
    embedders, which learn to return what the other layers read; then the other layers, block by block, each from the
    embedding of the quantized embedders, as they read it when all is learned together.
    """

    def __call__(self, structure: NetworkStructure, learnable: frozenset[str]) -> list[Unit]:
        temporal = tuple(layer for layer in structure.temporal_layers if layer in learnable)
        return [*temporal_units(structure, temporal), *TemporalFrozen()(structure, learnable)]


def temporal_units(structure: NetworkStructure, layers: Sequence[str]) -> list[Unit]:
    """The Temporal Information Block as one unit that learns these layers, or as several where it is large."""

    def unit(name: str, kind: type[TemporalInformationBlock], own: Sequence[str], **given: Any) -> Unit:
        return Unit(name, Kind.TEMPORAL, tuple(own), "timesteps", partial(kind, structure=structure, **given))

    name = "temporal_information_block"
    if sum(structure.layers[layer].weights for layer in layers) <= MOST_TEMPORAL:
        return [unit(name, TemporalInformationBlock, layers)] if layers else []
    embedders = [layer for layer in layers if structure.layers[layer].role is not Role.TIME_PROJ]
    blocks = {block.name: [layer for layer in block.layers if layer in layers] for block in structure.blocks}
    projections = {block: [layer for layer in own if layer not in embedders] for block, own in blocks.items()}
    return [
        *([unit(f"{name}.embedding", TemporalEmbedding, embedders)] if embedders else []),
        *(unit(f"{name}.{key}", TemporalInformationBlock, own, layers=own) for key, own in projections.items() if own),
    ]


@dataclass(frozen=True)
class SingleUnit:
    """One unit of a partition, for `debug=overfit`; all other layers stay float, so the network is not finished."""

    partition: Partition  # cuts the network into units
    unit: str | None = None  # name of the one; None: the one with the most layers, the first of them

    def __call__(self, structure: NetworkStructure, learnable: frozenset[str]) -> list[Unit]:
        """The unit by itself; ValueError where there is none of that name."""
        units = self.partition(structure, learnable)
        if self.unit is None:
            return [max(units, key=lambda unit: len(unit.layers))]
        if chosen := [unit for unit in units if unit.name == self.unit]:
            return chosen
        raise ValueError(f"unit must be one of {', '.join(unit.name for unit in units)}, got {self.unit!r}")


Origin = Literal["quantized", "float"]


class UnitInputs:
    """A choice of inputs: the networks in which they are captured, and how their batches become one."""

    origins: ClassVar[tuple[Origin, ...]]

    def combine(self, captured: Mapping[Origin, Any]) -> Any:
        """One batch of inputs from those captured in each network."""
        return captured[self.origins[0]]

    def learning_context(self, quantizers: Sequence[Quantizer]) -> AbstractContextManager[None]:
        """Context in which a unit with these activation quantizers learns."""
        return nullcontext()


@dataclass(frozen=True)
class QuantizedInputs(UnitInputs):
    """Inputs of the unit in the quantized network, so that it learns to repair the errors of earlier units."""

    origins = ("quantized",)


@dataclass(frozen=True)
class FloatInputs(UnitInputs):
    """Inputs of the unit in the float network, captured for many units in one pass (Q-Diffusion's learning of scales)."""

    origins = ("float",)


@dataclass(frozen=True)
class MixedInputs(UnitInputs):
    """QDrop (arXiv 2203.05740): elements of inputs, and of activations inside the unit, are quantized at random."""

    quant_prob: float = 0.5  # probability that an element is quantized, 0 to 1 (the release calls it `drop_prob`)
    origins = ("quantized", "float")

    def __post_init__(self) -> None:
        check_fields(self, quant_prob=SHARE)

    def combine(self, captured: Mapping[Origin, Any]) -> Any:
        return pytree.tree_map(self.mix, captured["quantized"], captured["float"])

    @contextmanager
    def learning_context(self, quantizers: Sequence[Quantizer]) -> Iterator[None]:
        with ExitStack() as hooks:
            for quantizer in quantizers:
                hook = quantizer.register_forward_hook(lambda _, args, output: self.mix(output, args[0]))
                hooks.enter_context(hook)
            yield

    def mix(self, quantized: Any, original: Any) -> Any:
        """Draw each element from one of two tensors; constants and integers (timesteps) are the same in both."""
        if not (isinstance(quantized, Tensor) and quantized.is_floating_point()):
            return quantized
        return torch.where(torch.rand_like(quantized) < self.quant_prob, quantized, original)

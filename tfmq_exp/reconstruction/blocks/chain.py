"""Chains of units: of a unit's inputs, which are outputs of the unit before it, and which others were given already."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from tfmq_exp.calibration.dataset import CalibrationSet
from tfmq_exp.denoisers.structure import Kind
from tfmq_exp.reconstruction.activation_cache import SpillAllocator
from tfmq_exp.reconstruction.capture import Capture
from tfmq_exp.reconstruction.recorded_calls import recorded_calls
from tfmq_exp.reconstruction.units import Unit


@dataclass(frozen=True)
class FromOutput:
    """A leaf of the outputs of the unit before."""

    index: int


@dataclass(frozen=True)
class FromFirst:
    """A leaf of the inputs of the segment's first unit."""

    index: int


@dataclass(frozen=True)
class Link:
    """A unit in a segment, and the source of each leaf of its (args, kwargs), whose structure is `spec`.

    A source is a `FromOutput`, a `FromFirst`, or the value itself where the leaf is no tensor. `outputs` are an example of what
    the unit returns, with its tensors on the meta device.
    """

    unit: Unit
    sources: tuple[Any, ...]
    spec: pytree.TreeSpec
    outputs: Any


@dataclass(frozen=True)
class Segment:
    """Consecutive units, each of which reads nothing but outputs of the one before and inputs of the first.

    Nothing else reads the outputs of any but the last. A network runs to capture the inputs of the first, and no more.
    """

    links: tuple[Link, ...]

    @property
    def units(self) -> tuple[Unit, ...]:
        return tuple(link.unit for link in self.links)

    @property
    def constants(self) -> frozenset[int]:
        """Leaves of the first unit's inputs that later units read."""
        return frozenset(s.index for link in self.links[1:] for s in link.sources if isinstance(s, FromFirst))


def read_segments(network: nn.Module, units: Sequence[Unit], data: CalibrationSet) -> list[Segment]:
    """Cut units that the denoiser drives into segments, by the identity of the tensors in one forward pass.

    Blocks of transformers alone are joined: what an embedding returns is read by layers outside of units, too.

    Args:
        network: the float network, or its copy on the meta device.
        units: in execution order.
        data: of which the network gets the first sample.
    """
    with recorded_calls({unit.name: unit.module(network) for unit in units}) as calls:
        list(Capture(data[slice(0, 1)], 1, SpillAllocator(0)).forward(network))
    inputs = [set(indices(calls[unit.name][:2])) for unit in units]
    outputs = [set(indices(calls[unit.name][2])) for unit in units]
    found: list[list[Link]] = []
    for i, unit in enumerate(units):
        before = outputs[i - 1] if i else set[int]()
        elsewhere = any(before & later for later in inputs[i + 1 :])  # a skip connection, too
        blocks = i > 0 and {units[i - 1].kind, unit.kind} == {Kind.TRANSFORMER}
        sources = sources_in(calls, found[-1], unit) if blocks and not elsewhere else None
        spec = pytree.tree_structure(calls[unit.name][:2])
        example = pytree.tree_map(lambda x: x.to("meta") if isinstance(x, Tensor) else x, calls[unit.name][2])
        if sources is None:
            found.append([])
        found[-1].append(Link(unit, sources or (), spec, example))
    return [Segment(tuple(links)) for links in found]


def sources_in(calls: dict[str, tuple[Any, ...]], links: Sequence[Link], unit: Unit) -> tuple[Any, ...] | None:
    """Sources of a unit's inputs if it continues these links; None if it does not."""
    outputs, first = (indices(x) for x in (calls[links[-1].unit.name][2], calls[links[0].unit.name][:2]))
    found: list[Any] = []
    for leaf in pytree.tree_leaves(calls[unit.name][:2]):
        if not isinstance(leaf, Tensor):
            found.append(leaf)
        elif id(leaf) in outputs:
            found.append(FromOutput(outputs[id(leaf)]))
        elif id(leaf) in first:
            found.append(FromFirst(first[id(leaf)]))
        else:
            return None
    return tuple(found) if any(isinstance(source, FromOutput) for source in found) else None


def indices(tree: Any) -> dict[int, int]:
    """Places of a structure's tensors among its leaves, by identity."""
    return {id(leaf): i for i, leaf in enumerate(pytree.tree_leaves(tree)) if isinstance(leaf, Tensor)}


def has_chain(segments: Iterable[Segment]) -> bool:
    """Whether a segment has several units."""
    return any(len(segment.links) > 1 for segment in segments)

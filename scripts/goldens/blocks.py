"""Blocks of the `temporal` goldens: their order, which of their inputs all samples share, and that each runs alone."""

from collections.abc import Iterator, Sequence
from operator import methodcaller
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from goldens.architectures import Architecture, is_constant
from goldens.comparing import EXACT, Group, Record
from tfmq_exp.calibration.dataset import CalibrationSet
from tfmq_exp.denoisers.structure import Kind
from tfmq_exp.quant.timestep_context import TimestepContext
from tfmq_exp.reconstruction.activation_cache import SpillAllocator, shared_leaves
from tfmq_exp.reconstruction.capture import Capture, call_unit, shared_inputs
from tfmq_exp.reconstruction.recorded_calls import recorded_calls
from tfmq_exp.reconstruction.units import Unit

MEMORY = 2**30  # bytes


def calibration_set(case: Architecture) -> CalibrationSet:
    """The recorded arguments as calibration data."""
    given = dict(case.arguments)
    x, t = given.pop(case.sample), given.pop(case.settings["timestep_argument"])
    constants = {name: value for name, value in given.items() if is_constant(name, value)}
    rows = {name: value for name, value in given.items() if name not in constants}
    count, t = torch.arange(len(x)), t.double() if t.is_floating_point() else t
    # `condition` says which row is whose, even where there are none
    return CalibrationSet(x, t, torch.zeros_like(count), count, rows, count, constants, case.sample)


def units_of(names: Sequence[str]) -> list[Unit]:
    """These modules as units."""
    return [Unit(name, Kind.TRANSFORMER, (), "denoiser", methodcaller("get_submodule", name)) for name in names]


def leaf_text(path: Any, leaf: Any, shared: bool) -> str:
    """One leaf as the goldens write it: where it is, whether samples have rows of it, its shape, and its type but float32."""
    place = pytree.keystr(path)
    if not isinstance(leaf, Tensor):
        return f"{place}:None" if leaf is None else f"{place}={leaf}"
    dtype = "" if leaf.dtype == torch.float32 else str(leaf.dtype)
    return f"{place}:{'shared' if shared else 'row'}{tuple(leaf.shape)}{dtype}"


def texts(tree: Any, shared: Sequence[bool]) -> list[str]:
    """All leaves of a structure as text."""
    leaves, _ = pytree.tree_flatten_with_path(tree)
    return [leaf_text(path, leaf, same) for (path, leaf), same in zip(leaves, shared, strict=True)]


def calls_of(case: Architecture, names: Sequence[str], data: CalibrationSet) -> dict[str, Any]:
    """(args, kwargs, output) of modules in one pass over some rows."""
    modules = {name: case.network.get_submodule(name) for name in names}
    with recorded_calls(modules) as calls:
        list(Capture(data, len(data), SpillAllocator(0)).forward(case.network))
        return dict(calls)


def order(case: Architecture, names: Sequence[str]) -> Group:
    """Whether the recorded blocks are blocks of ours, or lie inside one, in the order of execution."""
    group = Group(f"{case.name}: blocks in order", EXACT)
    ours = [block.name for block in case.structure.blocks]
    places = [next((i for i, own in enumerate(ours) if f"{name}.".startswith(f"{own}.")), -1) for name in names]
    group.compare(places.count(-1), 0)
    group.compare(places, sorted(places))
    lacking = [name for name, place in zip(names, places, strict=True) if place < 0]
    inside = [f"{name} inside {ours[i]}" for name, i in zip(names, places, strict=True) if i >= 0 and name != ours[i]]
    group.note = f"not ours: {lacking[0]}" if lacking else ", ".join(inside) or f"{len(names)} of our {len(ours)}"
    return group


def leaves(case: Architecture, recorded: Sequence[Record], data: CalibrationSet) -> Group:
    """Whether every leaf of the blocks' arguments and results is of the kind and shape that it had."""
    names = [block["name"] for block in recorded]
    shared = shared_inputs(case.network, units_of(names), data)
    one, two = (calls_of(case, names, data[slice(0, count)]) for count in (1, 2))
    whole = calls_of(case, names, data)
    group, wrong = Group(f"{case.name}: rows and constants of blocks", EXACT), list[str]()
    for block in recorded:
        *call, output = whole[block["name"]]
        kept = shared_leaves(one[block["name"]][-1], two[block["name"]][-1])
        ours = {"inputs": texts(tuple(call), shared[block["name"]]), "outputs": texts(output, kept)}
        for part, found in ours.items():
            different = sorted(set(found) ^ set(block[part]))
            group.compare(len(different), 0)
            wrong += [f"{block['name']} {part}: {text}" for text in different]
    group.note = "; ".join(wrong[:2])
    return group


def alone(case: Architecture, names: Sequence[str], data: CalibrationSet, memory: int = MEMORY) -> Group:
    """Whether blocks give the same bits when they run by themselves on what was captured.

    Args:
        case: the network.
        names: of its blocks.
        data: the calibration data.
        memory: bytes of the cache; what is beyond goes into files.
    """
    group, units, failed = Group(f"{case.name}: blocks alone", EXACT), units_of(names), list[str]()
    context = TimestepContext([t.item() for t in data.t.unique()])  # type: ignore[reportArgumentType]
    capture = Capture(data, len(data), storage := SpillAllocator(memory))
    shared = shared_inputs(case.network, units, data)
    for name, (inputs, outputs, _) in capture.activations(case.network, units, shared, with_inputs=True).items():
        given = inputs["float"]
        with torch.no_grad():
            again = call_unit(case.network.get_submodule(name), context, given.structure(given.tensors))
        pairs = zip(
            *map(pytree.tree_leaves, (again, outputs.structure(outputs.tensors))),
            strict=True,
        )
        equal = all(torch.equal(a, b) if isinstance(a, Tensor) else a is b for a, b in pairs)
        group.compare(int(equal), 1)
        failed += [] if equal else [name]
    storage.clear()
    group.note = ", ".join(failed[:3])
    return group


def check_blocks(case: Architecture, recorded: Sequence[Record]) -> Iterator[Group]:
    """Everything that is recorded of the blocks of one network."""
    names, data = [block["name"] for block in recorded], calibration_set(case)
    yield order(case, names)
    yield leaves(case, recorded, data)
    every = list(dict.fromkeys([*names, *(block.name for block in case.structure.blocks)]))
    yield alone(case, every, data)

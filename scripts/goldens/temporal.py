"""All that the `temporal` goldens hold, compared: outputs, roles, dependences, temporal features and blocks."""

from collections.abc import Iterator
from pathlib import Path

import torch

from goldens.architectures import Architecture, cast, in_precision, outputs_of, read_architecture
from goldens.blocks import check_blocks
from goldens.comparing import EXACT, Group, Record, coverage
from goldens.dependence import dependence
from goldens.families import read_json
from tfmq_exp.denoisers.structure import TEMPORAL_ROLES, Role
from tfmq_exp.denoisers.temporal import TemporalInformationBlock

SINGLE, DOUBLE = 1e-5, 1e-11  # rounding in another order of operations


def outputs(case: Architecture) -> Iterator[Group]:
    """The network's outputs, in single and double precision, and at every recorded timestep."""
    single = Group(f"{case.name}: out", SINGLE, absolute=True)
    single.compare(case.run(case.arguments), case.recorded["out"])
    yield single
    if case.settings["float64"]:
        double = Group(f"{case.name}: out_f64", DOUBLE, absolute=True)
        double.compare(case.run(case.arguments, in_precision(case.network, torch.float64)), case.recorded["out_f64"])
        yield double
    every = Group(f"{case.name}: out at {len(case.timesteps)} timesteps", SINGLE, absolute=True)
    for t, golden in zip(case.timesteps, case.recorded["out_of_t"], strict=True):
        every.compare(case.run(case.at(case.arguments, t)), golden)
    yield every


def roles(case: Architecture) -> Iterator[Group]:
    """The layers with temporal roles are the recorded sites; layers that never run are in no structure."""
    group = Group(f"{case.name}: roles", EXACT)
    different = {layer.name for layer in case.structure.by_role(*TEMPORAL_ROLES)} ^ set(case.settings["feature_sites"])
    group.compare(len(different), 0)
    ran = [name for name in case.settings["functional_layers"] if name in case.structure.layers]
    group.compare(len(ran), 0)
    group.note = ", ".join([*sorted(different), *ran])
    yield group


def features(case: Architecture, *, double: bool) -> Iterator[Group]:
    """Temporal features of every variation and timestep: those of the goldens, and the bits of those inside the network."""
    suffix, dtype = ("_f64", torch.float64) if double else ("", torch.float32)
    network = in_precision(case.network, dtype)
    block, sites = TemporalInformationBlock(network, case.structure), case.settings["feature_sites"]
    near = Group(f"{case.name}: features{suffix}", DOUBLE if double else SINGLE, absolute=True)
    equal = Group(f"{case.name}: features{suffix} inside the network", EXACT)
    lacking = {layer.name for layer in case.structure.by_role(Role.TIME_PROJ)}
    for i, variation in enumerate(case.settings["conditions"]):
        for j, t in enumerate(case.timesteps):
            arguments = case.at(case.variation(variation), t)
            with outputs_of(network, sites) as inside, torch.no_grad():
                case.run(arguments, network)
                found = dict(inside)
                time = cast(arguments[case.settings["timestep_argument"]], dtype)
                ours = block.features(time, {k: cast(v, dtype) for k, v in case.conditions(arguments).items()})
            for site, value in found.items():
                key = f"feature.{site}{suffix}"
                if not double or key in case.recorded:
                    near.compare(value[0], case.recorded[key][i, j])
            for name, value in ours.items():
                equal.compare(value, found[name])
                lacking.discard(name)
    equal.compare(len(lacking), 0)
    equal.note = f"not computed: {', '.join(sorted(lacking))}" if lacking else ""
    yield from (near, equal) if near.comparisons else (equal,)


def check_architecture(folder: Path, name: str, settings: Record, blocks: Record) -> tuple[list[Group], Record]:
    """Everything that is recorded of one network, and the recording, which knows what was read."""
    case = read_architecture(folder, name, settings)
    groups = [
        *outputs(case),
        *roles(case),
        *dependence(case),
        *features(case, double=False),
        *(features(case, double=True) if settings["float64"] else ()),
        *check_blocks(case, blocks[name]),
    ]
    return groups, case.recorded


def check_temporal(folder: Path) -> list[Group]:
    """Every comparison of a folder of the `temporal` layout, and whether every tensor took part.

    Raises:
        DamagedError: something is missing or cannot be read.
    """
    index, blocks = read_json(folder / "index.json"), read_json(folder / "blocks.json")["families"]
    groups, present, read = list[Group](), set[str](), set[str]()
    for name, settings in index.items():
        found, recorded = check_architecture(folder, name, settings, blocks)
        groups += found
        present |= {f"{name}: {key}" for key in recorded}
        read |= {f"{name}: {key}" for key in recorded.read}
    return [*groups, coverage("temporal: tensors read", present, read)]

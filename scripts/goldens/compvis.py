"""All that the `compvis` goldens hold, compared."""

import tempfile
from collections.abc import Iterator
from pathlib import Path

from goldens import networks
from goldens.comparing import Group, coverage, reading
from goldens.families import Family, read_family, read_json
from goldens.full_size import check_full_size
from goldens.trajectories import check_samplers, end_to_end
from tfmq_exp.denoisers.loading.autoencoder import LatentDecoder
from tfmq_exp.denoisers.loading.checkpoint import Checkpoint


def check_family(family: Family) -> Iterator[Group]:
    """Everything that is recorded of one network."""
    parts = family.load()
    conditions, contexts = networks.conditions(family, parts)
    yield from contexts
    yield from networks.predictions(family, parts.network)
    yield from networks.temporal_features(family, parts.network)
    if isinstance(parts.first_stage, LatentDecoder):
        yield from networks.images(family, parts.first_stage)
    yield from networks.kept_schedule(family)
    yield from end_to_end(family, parts.network, conditions)


def check_compvis(folder: Path) -> list[Group]:
    """Every comparison of a folder of the `compvis` layout, and whether every tensor took part.

    Raises:
        DamagedError: something is missing or cannot be read.
    """
    index = read_json(folder / "index.json")
    with reading(folder), tempfile.TemporaryDirectory() as scratch:
        families = [read_family(folder, name, settings, Path(scratch)) for name, settings in index.items()]
        others, files = check_samplers(folder, families)
        groups = [group for family in families for group in check_family(family)]
        files |= {f"{family.name}.io.safetensors": family.recorded for family in families}
        read = {f"{name}: {key}" for name, recorded in files.items() for key in recorded.read}
        read |= {f"{family.weights.name}: {key}" for family in families for key in family.placed()}
        paths = {*folder.glob("*.safetensors"), *(family.weights for family in families)}
        present: set[str] = set()
        for path in paths:
            with Checkpoint(path) as file:
                present |= {f"{path.name}: {key}" for key in file.names()}
        return [*groups, *others, *check_full_size(folder), coverage("tensors read", present, read)]

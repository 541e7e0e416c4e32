"""Jobs that are done are not done again: the store keeps what they left, and a job that is the same takes it from there.

    <store>/jobs/<key>/left.zip         results.json, tables and pictures of the run folder
                       artifacts.json   the stages that they stand on
                       origin.json      the run folder of the job that made them

An archive, so that whoever looks through the outputs for results does not take these for another run's.
"""

import json
import logging
import shutil
from collections.abc import Mapping
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any
from zipfile import ZIP_DEFLATED, ZipFile

from tfmq_exp.core.files import write_atomically, write_json
from tfmq_exp.core.formatting import format_bytes
from tfmq_exp.pipeline.store import DamagedEntry, Entry, Store

STAGE = "jobs"
# What a job writes into its run folder, and another that is the same would write as well. Whatever else lies there is not its.
WRITTEN = (
    *("results.json", "artifacts.json", "environment.json", "quantized.json"),
    *("samples.png", "samples_deployed.png", "temporal_error.csv", "temporal_error.png"),
    *("trajectory_error.csv", "trajectory_error.png", "trajectory_error_deployed.csv"),
    *("units.csv", "losses.csv", "noise.csv", "sites.csv", "diagnosis/*.csv", "diagnosis/*.png"),
)
LARGEST = 2**28  # bytes that a record may hold
log = logging.getLogger(__name__)


def is_written(name: str) -> bool:
    """Whether a file of that name, relative to the run folder, is one that jobs write."""
    path = PurePosixPath(name)
    return any(len(path.parts) == len(PurePosixPath(p).parts) and path.match(p) for p in WRITTEN)


def left_in(folder: Path) -> list[Path]:
    """Files that a job left in its run folder, and that another would leave as well."""
    found = {path for pattern in WRITTEN for path in folder.glob(pattern)}
    return sorted(path for path in found if path.is_file() and not path.is_symlink())


def clear(folder: Path, settings: str) -> None:
    """Remove what another job has left in a run folder: under this one's configuration it would be taken for its results.

    Args:
        folder: that may be the run folder of an earlier job.
        settings: this job's, as `config.yaml` will have them.
    """
    config = folder / "config.yaml"
    if config.is_file() and (folder / "artifacts.json").is_file() and config.read_bytes() != settings.encode():
        log.warning("%s was the run folder of another job, whose results are replaced", folder)
        for path in left_in(folder):
            path.unlink()


def keep(store: Store, record: Entry, folder: Path) -> None:
    """Note a job as finished, with copies of what it left; where that cannot be, a warning says why."""

    def fill(target: Path) -> None:
        write_atomically(target / "left.zip", lambda path: pack(folder, path))
        write_atomically(target / "artifacts.json", partial(shutil.copyfile, folder / "artifacts.json"))
        write_json(target / "origin.json", {"folder": str(folder)})

    try:
        if (size := sum(path.stat().st_size for path in left_in(folder))) > LARGEST:
            raise OSError(f"its files have {format_bytes(size)}, more than {format_bytes(LARGEST)}")
        if record.done and not undamaged(record):
            shutil.rmtree(record.path)
        store.pull(record, fill)
    except OSError as error:
        log.warning("the job is done, but the store cannot note that it is: %s", error)


def take(store: Store, record: Entry, folder: Path) -> Path | None:
    """Put a finished job's results into another's folder; returns the folder that they are from.

    None, and nothing happens, where there is no such job, where what it left was changed since, or where a stage that it
    stands on was deleted from the store, which is how one asks for that stage to be made again.
    """
    if not (record.done and undamaged(record)):
        return None
    stages = json.loads((record.path / "artifacts.json").read_text(encoding="utf-8"))
    for name, stage in stages.items():
        if not still_there(store, stage):
            log.warning("this job was finished before, but its %s is gone from the store: once more", name)
            return None
    with ZipFile(record.path / "left.zip") as archive:
        members = [member for member in archive.infolist() if is_written(member.filename)]
        if sum(member.file_size for member in members) > LARGEST:
            return None
        archive.extractall(folder, members)
    here = {name: {**stage, "computed": False, "seconds": 0.0} for name, stage in stages.items()}
    write_json(folder / "artifacts.json", here)
    return Path(json.loads((record.path / "origin.json").read_text(encoding="utf-8"))["folder"])


def still_there(store: Store, stage: Mapping[str, Any]) -> bool:
    """Whether the store has a stage of a run's record with all its files."""
    path = Path(stage["path"])
    entry = Entry(path.parent.name, path.name, store.root / path.parent.name / path.name, {})
    try:
        return entry.whole
    except DamagedEntry:
        return False


def pack(folder: Path, target: Path) -> None:
    """An archive of what a job left."""
    with ZipFile(target, "w", ZIP_DEFLATED) as archive:
        for path in left_in(folder):
            archive.write(path, path.relative_to(folder))


def undamaged(record: Entry) -> bool:
    """Whether all files are what was written."""
    try:
        record.verify()
    except DamagedEntry as damage:
        log.warning("%s", damage)
        return False
    return True

"""Jobs that are done are not done again: the store keeps what they left, and a job that is the same takes it from there.

    <store>/jobs/<key>/left.zip         results.json, tables and pictures of the run folder
                       artifacts.json   the stages that they stand on
                       origin.json      the run folder of the job that made them

An archive, so that whoever looks through the outputs for results does not take these for another run's.
"""

import json
import logging
import shutil
from pathlib import Path
from zipfile import ZIP_DEFLATED, ZipFile

from tfmq_exp.experiment.store import DamagedEntry, Entry, Store
from tfmq_exp.files import write_atomically, write_json

STAGE = "jobs"
# What every job writes for itself, or a dashboard for it.
OWN = ("config.yaml", "run.log", "status.json", "profile.txt", "profile.pstats", "wandb", "wandb.id", "tensorboard")
log = logging.getLogger(__name__)


def left_in(folder: Path) -> list[Path]:
    """Files that a job left in its run folder, and in folders there, and that another would leave as well."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return [path for path in files if (top := path.relative_to(folder).parts[0]) not in OWN and not top.startswith(".")]


def keep(store: Store, record: Entry, folder: Path) -> None:
    """Note a job as finished, with copies of what it left."""

    def fill(target: Path) -> None:
        write_atomically(target / "left.zip", lambda path: pack(folder, path))
        shutil.copyfile(folder / "artifacts.json", target / "artifacts.json")
        write_json(target / "origin.json", {"folder": str(folder)})

    if record.done and not whole(record):
        shutil.rmtree(record.path)
    store.pull(record, fill)


def take(store: Store, record: Entry, folder: Path) -> Path | None:
    """Put a finished job's results into another's folder; returns the folder that they are from.

    None, and nothing happens, where there is no such job, where what it left was changed since, or where a stage that it
    stands on was deleted from the store, which is how one asks for that stage to be made again.
    """
    if not (record.done and whole(record)):
        return None
    stages = json.loads((record.path / "artifacts.json").read_text(encoding="utf-8"))
    for name, stage in stages.items():
        where = Path(stage["path"])
        if not (store.root / where.parent.name / where.name / "manifest.json").is_file():
            log.warning("this job was finished before, but its %s is gone from the store: once more", name)
            return None
    with ZipFile(record.path / "left.zip") as archive:
        archive.extractall(folder)
    here = {name: {**stage, "computed": False, "seconds": 0.0} for name, stage in stages.items()}
    write_json(folder / "artifacts.json", here)
    return Path(json.loads((record.path / "origin.json").read_text(encoding="utf-8"))["folder"])


def pack(folder: Path, target: Path) -> None:
    """An archive of what a job left."""
    with ZipFile(target, "w", ZIP_DEFLATED) as archive:
        for path in left_in(folder):
            archive.write(path, path.relative_to(folder))


def whole(record: Entry) -> bool:
    """Whether all files are what was written."""
    try:
        record.verify()
    except DamagedEntry as damage:
        log.warning("%s", damage)
        return False
    return True

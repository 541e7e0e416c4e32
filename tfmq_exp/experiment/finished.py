"""Jobs that are done are not done again: the store keeps what they left, and a job that is the same takes it from there.

<store>/jobs/<key>/results/...    results.json, tables and pictures of the run folder
                  origin.json     the run folder of the job that made them
"""

import json
import logging
import shutil
from collections.abc import Iterable
from pathlib import Path

from tfmq_exp.experiment.store import DamagedEntry, Entry, Store, write_json

STAGE = "jobs"
# What every job writes for itself, or a dashboard for it.
OWN = ("config.yaml", "run.log", "status.json", "profile.txt", "profile.pstats", "wandb", "wandb.id", "tensorboard")
log = logging.getLogger(__name__)


def left_in(folder: Path) -> list[Path]:
    """What a job left in its run folder and another would leave as well: files, and folders of them."""
    return [path for path in sorted(folder.iterdir()) if path.name not in OWN and not path.name.startswith(".")]


def keep(store: Store, record: Entry, folder: Path) -> None:
    """Note a job as finished, with copies of what it left."""

    def fill(target: Path) -> None:
        copy(left_in(folder), target / "results")
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
    stages = json.loads((record.path / "results" / "artifacts.json").read_text())
    for name, stage in stages.items():
        where = Path(stage["path"])
        if not (store.root / where.parent.name / where.name / "manifest.json").is_file():
            log.warning("this job was finished before, but its %s is gone from the store: once more", name)
            return None
    copy((record.path / "results").iterdir(), folder)
    here = {name: {**stage, "computed": False, "seconds": 0.0} for name, stage in stages.items()}
    write_json(folder / "artifacts.json", here)
    return Path(json.loads((record.path / "origin.json").read_text())["folder"])


def copy(paths: Iterable[Path], target: Path) -> None:
    """Files and folders into a folder, over what has the same name there."""
    target.mkdir(exist_ok=True)
    for path in paths:
        if path.is_dir():
            shutil.copytree(path, target / path.name, dirs_exist_ok=True)
        else:
            shutil.copyfile(path, target / path.name)


def whole(record: Entry) -> bool:
    """Whether all files are what was written."""
    try:
        record.verify()
    except DamagedEntry as damage:
        log.warning("%s", damage)
        return False
    return True

"""Job cache: results of finished jobs, by everything that decides them.

    <store>/jobs/<key>/left.zip         results.json, tables and pictures of the run folder
                       artifacts.json   the stages that they are made from
                       origin.json      the run folder of the job that made them

An archive, so that programs that collect results do not count these as another run's.
"""

import hashlib
import logging
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any
from zipfile import ZIP_DEFLATED, ZipFile

from omegaconf import DictConfig, OmegaConf

from tfmq_exp.core.files import read_json, write_atomically, write_json
from tfmq_exp.core.formatting import format_bytes
from tfmq_exp.data.tree import files_below
from tfmq_exp.pipeline.store import DamagedEntry, Entry, Store, code_of

PACKAGE = Path(__file__).parents[1]
LARGEST = 2**28  # bytes of an archive's files
# Files of a run folder that an identical job would write as well.
WRITTEN = (
    *("results.json", "artifacts.json", "environment.json", "quantized.json", "components.json"),
    *("samples.png", "samples_deployed.png", "temporal_error.csv", "temporal_error.png"),
    *("trajectory_error.csv", "trajectory_error.png", "trajectory_error_deployed.csv"),
    "image_distances.csv",
    *("comparison.json", "comparison.html"),
    *("units.csv", "losses.csv", "noise.csv", "sites.csv", "diagnosis/*.csv", "diagnosis/*.png"),
)
# Settings that change no result: locations (files that are read are identified one by one), and how the work is done.
LOCATIONS = ("paths", "force", "dry_run", "logger")
EXECUTION = (
    *("processes", "estimate", "threads", "traceback"),
    *("activation_cache_gib", "activation_cache_dir", "device_cache_gib", "checkpoint_every_min"),
)
# Overrides that change something inside a method, and with it the name of its row in tables.
INSIDE = ("method/", "method.", "quant.", "first_stage.", "text_encoder.")
log = logging.getLogger(__name__)


def job_identity(cfg: DictConfig, overrides: Sequence[str]) -> dict[str, Any]:
    """Everything that decides the files of a job, as plain data.

    Of a logger only the kind counts, so that a finished job is shown where another logger is asked for.
    """
    settings: Any = OmegaConf.to_container(cfg, resolve=True)
    packages = {text.split(".")[0] for key, text in texts(settings) if key == "_target_"} - {PACKAGE.name}
    return {
        "settings": {key: value for key, value in settings.items() if key not in (*LOCATIONS, "runtime")},
        "runtime": {key: value for key, value in settings["runtime"].items() if key not in EXECUTION},
        "named": sorted(text for text in overrides if text.startswith((*INSIDE, "experiment="))),
        "shown": sorted(dashboards(settings["logger"])),
        "program": program_version(PACKAGE),
        "files": files_read(settings),
        "outside": {name: code for name in sorted(packages) if (code := code_of(name))},  # not of installed packages
    }


def dashboards(logger: Mapping[str, Any]) -> Iterator[str]:
    """Targets of a logger and of those inside it that show anything."""
    for value in logger.values():
        if isinstance(value, Mapping):
            yield from dashboards(value)
    if "_target_" in logger and logger.get("mode") != "disabled":
        yield logger["_target_"]


def program_version(package: Path) -> str:
    """Hash of every file of the package: its code, and the weights that it ships."""
    digest = hashlib.sha256()
    for path in sorted(path for path in package.rglob("*") if "__pycache__" not in path.parts and path.is_file()):
        digest.update(f"{path.relative_to(package).as_posix()}\0{path.stat().st_size}\0".encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def files_read(settings: Mapping[str, Any]) -> dict[str, str]:
    """State of the files and folders that the settings name."""
    named = {text for key, text in texts({**settings, **dict.fromkeys(LOCATIONS)}) if key != "name" and text}
    return {text: state_of(Path(text)) for text in sorted(filter(os.path.exists, named))}


def state_of(path: Path) -> str:
    """Hash of names, sizes, times and inodes of a file, or of all files below a folder, links followed; content is not read.

    The time of the status (ctime) counts, which no program can set: a file whose time of modification was restored differs.
    """
    digest = hashlib.sha256(os.fsencode(path.resolve()))
    for name in sorted(name for name, _ in files_below(path)) if path.is_dir() else ["."]:
        try:
            seen = (path / name).stat()
            state = f"{seen.st_size}\0{seen.st_mtime_ns}\0{seen.st_ctime_ns}\0{seen.st_ino}"
        except OSError as error:  # a link that leads nowhere is a part of a folder, too
            state = str(error.errno)
        digest.update(os.fsencode(f"{name}\0{state}\0"))
    return digest.hexdigest()[:16]


def texts(node: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Every text in nested plain data, with its key."""
    if isinstance(node, str):
        yield key, node
    for name, value in node.items() if isinstance(node, Mapping) else ():
        yield from texts(value, str(name))
    for value in node if isinstance(node, list) else ():
        yield from texts(value, key)


def is_written(name: str) -> bool:
    """Whether jobs write a file of that name, relative to the run folder."""
    path = PurePosixPath(name)
    return any(len(path.parts) == len(PurePosixPath(p).parts) and path.match(p) for p in WRITTEN)


def left_in(folder: Path) -> list[Path]:
    """Files of a run folder that an identical job would write as well."""
    found = {path for pattern in WRITTEN for path in folder.glob(pattern)}
    return sorted(path for path in found if path.is_file() and not path.is_symlink())


def claim(folder: Path, cfg: DictConfig) -> None:
    """Write `config.yaml` into the run folder of a job; results of another job are removed before."""
    config = folder / "config.yaml"
    settings = OmegaConf.to_yaml(cfg, resolve=True).encode(errors="backslashreplace")
    if config.is_file() and (folder / "artifacts.json").is_file() and config.read_bytes() != settings:
        log.warning("%s was the run folder of another job, whose results are replaced", folder)
        for path in left_in(folder):
            path.unlink()
    write_atomically(config, lambda path: path.write_bytes(settings))


def keep(store: Store, record: Entry, folder: Path) -> None:
    """Store the results of a finished job; a warning says why where that cannot be."""
    files = left_in(folder)

    def pack(target: Path) -> None:
        with ZipFile(target, "w", ZIP_DEFLATED) as archive:
            for path in files:
                archive.write(path, path.relative_to(folder))

    def fill(target: Path) -> None:
        write_atomically(target / "left.zip", pack)
        write_atomically(target / "artifacts.json", partial(shutil.copyfile, folder / "artifacts.json"))
        write_json(target / "origin.json", {"folder": str(folder)})

    try:
        if (size := sum(path.stat().st_size for path in files)) > LARGEST:
            raise OSError(f"its files have {format_bytes(size)}, more than {format_bytes(LARGEST)}")
        try:
            store.get_or_compute(record, fill)
        except DamagedEntry:
            shutil.rmtree(record.path)
            store.get_or_compute(record, fill)
    except OSError as error:
        log.warning("the job is done, but the store cannot note that it is: %s", error)


def take(store: Store, record: Entry, folder: Path) -> Path | None:
    """Copy a finished job's results into the folder of another; returns the folder that they come from.

    None without such a job, where its results were changed since, or where a stage that they are made from was deleted from
    the store, by which users ask for that stage to be computed again.
    """
    if not record.done:
        return None
    try:
        record.verify()
        stages = read_json(record.path / "artifacts.json")
        for name, stage in stages.items():
            stored_as, key = Path(stage["path"]).parts[-2:]
            if not Entry(stored_as, key, store.root / stored_as / key, {}).complete:
                log.warning("this job was finished before, but its %s is gone from the store: once more", name)
                return None
    except DamagedEntry as damage:
        log.warning("%s", damage)
        return None
    with ZipFile(record.path / "left.zip") as archive:
        members = [member for member in archive.infolist() if is_written(member.filename)]
        if sum(member.file_size for member in members) > LARGEST:
            return None
        archive.extractall(folder, members)
    found = {name: {**stage, "computed": False, "seconds": 0.0} for name, stage in stages.items()}
    write_json(folder / "artifacts.json", found)
    return Path(read_json(record.path / "origin.json")["folder"])

"""What decides the results of a job: its configuration, the program, and the files that it reads."""

import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from tfmq_exp.data.tree import files_below
from tfmq_exp.pipeline.store import code_of

PACKAGE = Path(__file__).parents[1]
# Where files are (those that are read are looked at one by one), and how the work is done, not what comes out.
ELSEWHERE = ("paths", "repeat", "dry_run", "logger")
MEANS = ("processes", "estimate", "threads", "traceback", "cache_gib", "cache_dir", "checkpoint_minutes")
# Overrides that change something inside a method, and with it the name of its row in tables.
INSIDE = ("method/", "method.", "quant.")


def job_identity(cfg: DictConfig, overrides: Sequence[str]) -> dict[str, Any]:
    """Plain data; jobs with the same leave the same files.

    Of a logger only the kind counts, so that a finished job is shown where another logger is asked for.
    """
    settings: Any = OmegaConf.to_container(cfg, resolve=True)
    return {
        "settings": {key: value for key, value in settings.items() if key not in (*ELSEWHERE, "runtime")},
        "runtime": {key: value for key, value in settings["runtime"].items() if key not in MEANS},
        "named": sorted(text for text in overrides if text.startswith((*INSIDE, "experiment="))),
        "shown": sorted(dashboards(settings["logger"])),
        "program": program_version(PACKAGE),
        "files": files_read(settings),
        "outside": outside_code(settings),
    }


def dashboards(logger: Mapping[str, Any]) -> Iterator[str]:
    """Targets of a logger and of those inside it, but for one that is disabled and shows nothing."""
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


def outside_code(settings: Mapping[str, Any]) -> dict[str, str]:
    """Packages and modules of others that the settings name as targets, with a hash of their Python files.

    Installed libraries are not looked into.
    """
    names = {text.split(".")[0] for key, text in texts(settings) if key == "_target_"} - {PACKAGE.name}
    return {name: code for name in sorted(names) if (code := code_of(name)) is not None}


def files_read(settings: Mapping[str, Any]) -> dict[str, str]:
    """Files and folders that the settings name, with a hash of their names, sizes and times.

    Hashing gigabytes takes longer than finding a result; a file that was written anew has another time.
    """
    named = {text for key, text in texts({k: v for k, v in settings.items() if k not in ELSEWHERE}) if key != "name"}
    return {text: state_of(Path(text)) for text in sorted(named) if text and exists(Path(text))}


def exists(path: Path) -> bool:
    """False also for texts that cannot be the name of a file."""
    try:
        return path.exists()
    except (OSError, ValueError):
        return False


def state_of(path: Path) -> str:
    """Hash of the names, sizes, times and inodes of a file, or of all files below a folder and below what links there lead to.

    Of the times that of the status (ctime) is one, which no program can set: a file whose time of modification was
    restored is another file.
    """
    names = sorted(name for name, _ in files_below(path)) if path.is_dir() else ["."]
    digest = hashlib.sha256(os.fsencode(path.resolve()))
    for name in names:
        try:
            seen = (path / name).stat()
            state = f"{seen.st_size}\0{seen.st_mtime_ns}\0{seen.st_ctime_ns}\0{seen.st_ino}"
        except OSError as error:  # a link that leads nowhere is a part of a folder, too
            state = str(error.errno)
        digest.update(os.fsencode(f"{name}\0{state}\0"))
    return digest.hexdigest()[:16]


def texts(node: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Every text in nested plain data, with the key that it stands under."""
    if isinstance(node, str):
        yield key, node
    elif isinstance(node, Mapping):
        for name, value in node.items():
            yield from texts(value, str(name))
    elif isinstance(node, list):
        for value in node:
            yield from texts(value, key)

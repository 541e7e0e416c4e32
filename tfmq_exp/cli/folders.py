"""Folders of a job that cannot be made, or hold one another: a store inside a run folder, results among images that are read."""

import os
from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from tfmq_exp.cli.terminal import Terminal, say_error

RUN = "the run folder (hydra.run.dir, hydra.sweep.dir)"


class FolderCheck(Callback):
    """Hydra callback: checks and makes the first folder before Hydra does.

    Raises:
        SystemExit: with status 1, after the error is printed.
    """

    def on_run_start(self, config: DictConfig, **_: Any) -> None:
        """Before one job."""
        stop_without_folders(config, "hydra.run.dir")

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        """Before a sweep."""
        stop_without_folders(config, "hydra.sweep.dir")


def stop_without_folders(config: DictConfig, key_of_first: str) -> None:
    """End the command where a folder that it writes to has no name, is something else, or cannot be made.

    Args:
        config: of the command, with Hydra's part.
        key_of_first: of the folder that Hydra would make before anything else.
    """
    try:
        for key in ("name", "paths.outputs", "paths.store", key_of_first):
            check_references(config, key)
        name = OmegaConf.select(config, "name")
        if "/" in str(name):
            raise ValueError(
                f"name={name}: a run's folder is called so, and a slash would put it elsewhere; leave it out"
            )
        first = str(OmegaConf.select(config, key_of_first))
        for key in ("paths.outputs", "paths.store"):
            place = OmegaConf.select(config, key)
            if not isinstance(place, str) or not place.strip():  # which would be the root, or the working directory
                raise ValueError(f"{key} must be a folder, got {place!r}")
            if os.path.lexists(place) and not os.path.isdir(place):
                raise ValueError(f"{key}={place} is no folder, nor a link to one")
        try:
            Path(first).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            keys = "paths.outputs, hydra.run.dir, hydra.sweep.dir"
            raise ValueError(f"{keys}: no folder {first}: {error.strerror}") from error
    except ValueError as error:
        say_error(Terminal(stderr=True), str(error))
        raise SystemExit(1) from None


def check_references(config: DictConfig, key: str) -> None:
    """Raise ValueError where a value refers to a key that is not there, as a file's name with `${` seems to."""
    try:
        OmegaConf.select(config, key)
    except OmegaConfBaseException as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"{key}: {reason}; a $ of a name before a brace needs a backslash before it: \\${{") from error


def check_folders(cfg: DictConfig, run: Path, *, moves: bool) -> None:
    """Check the folders that a job writes to.

    Args:
        cfg: the job.
        run: its run folder.
        moves: whether Hydra makes that the working directory.

    Raises:
        ValueError: folders that hold each other and must not, by their keys.
    """
    if moves:
        raise ValueError(
            "hydra.job.chdir must be false: in another working directory relative paths (paths.outputs, paths.store, "
            "data.path, checkpoints) are other files, and no two runs share a store"
        )
    written = written_folders(cfg, run)
    for inner, outer in (("paths.store", RUN), (RUN, "paths.store"), ("paths.outputs", "paths.store")):
        if inside(written[inner], written[outer]):
            raise ValueError(
                f"{inner} ({written[inner]}) lies in {outer} ({written[outer]}): keep what runs leave and the store apart"
            )


def check_images_apart(cfg: DictConfig, run: Path) -> None:
    """Raise ValueError where the folder of real images, which is read at any depth, holds a folder that is written to."""
    images = OmegaConf.select(cfg, "data.path", default=None, throw_on_missing=False)
    if isinstance(images, str) and Path(images).is_dir():
        for name, folder in written_folders(cfg, run).items():
            if inside(folder, Path(images)):
                raise ValueError(
                    f"data.path={images} holds {name} ({folder}), whose pictures would be read as images: "
                    "choose a folder of images alone"
                )


def written_folders(cfg: DictConfig, run: Path) -> dict[str, Path]:
    """Folders that a job writes to, by key."""
    return {"paths.outputs": Path(cfg.paths.outputs), "paths.store": Path(cfg.paths.store), RUN: run}


def inside(inner: Path, outer: Path) -> bool:
    """Whether a folder is another one or lies below it, links followed; neither need exist."""
    return inner.resolve().is_relative_to(outer.resolve())

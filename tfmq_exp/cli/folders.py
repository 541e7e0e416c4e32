"""Folders of a job that would hold one another: a store inside a run folder, results among the images that are read, ..."""

import os
from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf

from tfmq_exp.cli.terminal import Terminal, say_error

RUN = "the run folder (hydra.run.dir, hydra.sweep.dir)"


class FolderCheck(Callback):
    """Hydra callback: before Hydra makes the first folder, whether it can be made, and lies where somebody has said.

    Raises:
        SystemExit: with status 1, once the error is said.
    """

    def on_run_start(self, config: DictConfig, **_: Any) -> None:
        """Of one job."""
        stop_without_folders(config, config.hydra.run.dir)

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        """Of a sweep."""
        stop_without_folders(config, config.hydra.sweep.dir)


def stop_without_folders(config: DictConfig, first: str) -> None:
    """Say what is wrong with the folders that a command writes to, and end it."""
    try:
        check_places(config.paths.outputs, config.paths.store)
        make_folder(Path(first))
    except ValueError as error:
        say_error(Terminal(stderr=True), str(error))
        raise SystemExit(1) from None


def check_places(outputs: Any, store: Any) -> None:
    """Raise ValueError where a folder has no name, which would be the root or the working directory, or is something else."""
    for key, value in {"paths.outputs": outputs, "paths.store": store}.items():
        if not isinstance(value, str) or not value.strip():
            raise ValueError(f"{key} must be a folder, got {value!r}")
    for key, place in {"paths.outputs": Path(outputs), "paths.store": Path(store)}.items():
        if os.path.lexists(place) and not os.path.isdir(place):
            raise ValueError(f"{key}={place} is no folder, nor a link to one")


def make_folder(folder: Path) -> None:
    """Make a folder with all above it; ValueError says what is in its way."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(
            f"paths.outputs, hydra.run.dir, hydra.sweep.dir: no folder {folder}: {error.strerror}"
        ) from error


def check_folders(cfg: DictConfig, run: Path, *, moves: bool) -> None:
    """Look at where a job reads and writes.

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
    """Look at the folder that real images are read from, at any depth; only scores and training read any.

    Args:
        cfg: the job.
        run: its run folder.

    Raises:
        ValueError: it holds folders that are written to, by its key.
    """
    value = OmegaConf.select(cfg, "data.path", default=None, throw_on_missing=False)
    if isinstance(value, str) and Path(value).is_dir():
        for name, folder in written_folders(cfg, run).items():
            if inside(folder, Path(value)):
                raise ValueError(
                    f"data.path={value} holds {name} ({folder}), whose pictures would be read as images: "
                    "choose a folder of images alone"
                )


def written_folders(cfg: DictConfig, run: Path) -> dict[str, Path]:
    """Where a job writes, by key."""
    return {"paths.outputs": Path(cfg.paths.outputs), "paths.store": Path(cfg.paths.store), RUN: run}


def inside(inner: Path, outer: Path) -> bool:
    """Whether a folder is another one or lies below it, links followed; neither need exist."""
    return inner.resolve().is_relative_to(outer.resolve())

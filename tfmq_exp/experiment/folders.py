"""Folders of a job that would hold one another: a store inside a run folder, results among the images that are read, ..."""

from pathlib import Path

from omegaconf import DictConfig, OmegaConf

RUN = "the run folder (hydra.run.dir, hydra.sweep.dir)"
READ = ("data.path",)  # folders whose images are read, at any depth


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
    """Look at where a job reads images, if it does: only scores and training need them.

    Args:
        cfg: the job.
        run: its run folder.

    Raises:
        ValueError: a folder of images holds what runs leave, by their keys.
    """
    for key in READ:
        value = OmegaConf.select(cfg, key, default=None, throw_on_missing=False)
        if isinstance(value, str) and Path(value).is_dir():
            for name, folder in written_folders(cfg, run).items():
                if inside(folder, Path(value)):
                    raise ValueError(
                        f"{key}={value} holds {name} ({folder}), whose pictures would be read as images: "
                        "choose a folder of images alone"
                    )


def written_folders(cfg: DictConfig, run: Path) -> dict[str, Path]:
    """Where a job writes, by key."""
    return {"paths.outputs": Path(cfg.paths.outputs), "paths.store": Path(cfg.paths.store), RUN: run}


def inside(inner: Path, outer: Path) -> bool:
    """Whether a folder is another one or lies below it, links followed; neither need exist."""
    return inner.resolve().is_relative_to(outer.resolve())

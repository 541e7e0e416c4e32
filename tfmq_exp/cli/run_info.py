"""Name, folder and command line of a run, as Hydra started it. Nothing else in the program reads Hydra's global state."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf


@dataclass(frozen=True)
class RunInfo:
    """A run as Hydra started it.

    Args:
        name: of the run folder.
        folder: where the run writes.
        overrides: of the command line, `key=value` each.
        choices: chosen file by config group, Hydra's own groups left out.
        sweep: whether it is a job of a sweep.
        job_number: in the sweep; None outside sweeps.
        config_folders: folders that the configuration is read from.
        chdir: whether Hydra makes the run folder the working directory.
    """

    name: str
    folder: Path
    overrides: tuple[str, ...]
    choices: Mapping[str, str]
    sweep: bool
    job_number: int | None
    config_folders: tuple[Path, ...] = ()
    chdir: bool = False


def current_run() -> RunInfo:
    """The run that Hydra has started in this process."""
    hydra = HydraConfig.get()
    folder = Path(hydra.runtime.output_dir)
    chosen = {str(group): file for group, file in hydra.runtime.choices.items() if not str(group).startswith("hydra/")}
    return RunInfo(
        name=folder.name,
        folder=folder,
        overrides=tuple(hydra.overrides.task),
        choices={group: str(file) for group, file in sorted(chosen.items()) if file is not None},
        sweep=hydra.mode == RunMode.MULTIRUN,
        job_number=None if OmegaConf.is_missing(hydra.job, "num") else hydra.job.num,
        config_folders=tuple(Path(source.path) for source in hydra.runtime.config_sources if source.schema == "file"),
        chdir=bool(hydra.job.chdir),
    )


def hydra_state() -> Any:
    """Hydra's global state, for another process of the run."""
    return HydraConfig.get()


def restore_hydra_state(hydra: DictConfig) -> None:
    """Set Hydra's global state in another process."""
    HydraConfig.instance().set_config(OmegaConf.create({"hydra": hydra}))

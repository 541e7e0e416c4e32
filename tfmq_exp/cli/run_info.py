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
    """A run as Hydra started it."""

    folder: Path  # where the run writes
    overrides: tuple[str, ...]  # of the command line, `key=value` each
    choices: Mapping[str, str]  # chosen file by config group, Hydra's own groups left out
    sweep: bool  # whether it is a job of a sweep
    job_number: int | None  # in the sweep; None outside sweeps
    config_folders: tuple[Path, ...] = ()  # that the configuration is read from
    chdir: bool = False  # whether Hydra makes the run folder the working directory

    @property
    def name(self) -> str:
        """Name of the run folder."""
        return self.folder.name


def current_run() -> RunInfo:
    """The run that Hydra has started in this process."""
    hydra = HydraConfig.get()
    chosen = {str(group): file for group, file in hydra.runtime.choices.items() if not str(group).startswith("hydra/")}
    return RunInfo(
        folder=Path(hydra.runtime.output_dir),
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

"""Loggers: dashboards that show a run outside its folder. All that they show is in the run folder as well."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

Rows = Sequence[Mapping[str, Any]]
Points = Sequence[tuple[int, Mapping[str, float]]]


@dataclass(frozen=True)
class RunMetadata:
    """Identity and settings of a run."""

    folder: Path  # a run that goes on in the same folder is the same run
    name: str
    group: str | None  # common to the runs of one sweep; None outside sweeps
    kind: str  # the method
    tags: tuple[str, ...]
    choices: Mapping[str, str]  # the file that was chosen from each config group
    settings: Mapping[str, Any]  # the resolved configuration, and the environment


class Logger:
    """A dashboard of one run. Every method does nothing unless it is overridden."""

    def log_loss(self, unit: str, iteration: int, value: float) -> None:
        """Log one point of a loss curve; `unit` has the phase of learning too: `weights/mid_block.resnets.0`."""

    def log_curve(self, name: str, axis: str, points: Points) -> None:
        """Log several curves over one axis (a timestep, a step): at each place the value of every curve by its name."""

    def log_table(self, name: str, rows: Rows) -> None:
        """Log rows with the same columns."""

    def log_image(self, name: str, path: Path) -> None:
        """Log a picture."""

    def log_summary(self, values: Mapping[str, Any]) -> None:
        """Log final numbers, some of them or all."""

    def close(self, *, failed: bool) -> None:
        """End the run."""

    def locations(self) -> Sequence[str]:
        """Lines that say where a closed run can be seen, and how."""
        return ()


class LoggerConfig(Protocol):
    """Settings of a logger (`conf/logger/`)."""

    def open(self, run: RunMetadata) -> Logger:
        """Start the logger of one run."""
        ...


class NullLogger(Logger):
    """A logger that shows nothing."""


@dataclass(frozen=True)
class NoLogger:
    """Settings for the run folder alone."""

    def open(self, run: RunMetadata) -> Logger:
        return NullLogger()

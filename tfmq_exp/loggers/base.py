"""What a dashboard is told of a run. Everything is in the run folder as well: a mirror shows, it never keeps alone."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

Rows = Sequence[Mapping[str, Any]]
Points = Sequence[tuple[int, Mapping[str, float]]]


@dataclass(frozen=True)
class RunMetadata:
    """What is known of a run before it starts.

    Args:
        folder: where the run writes; a run that goes on in the same folder is the same run.
        name: how people call it.
        group: what the runs of one sweep share; None outside sweeps.
        kind: the method.
        tags: words to find it by.
        choices: the file that was chosen from each config group.
        settings: the resolved configuration, and the environment.
    """

    folder: Path
    name: str
    group: str | None
    kind: str
    tags: tuple[str, ...]
    choices: Mapping[str, str]
    settings: Mapping[str, Any]


class Logger(Protocol):
    """Shows a run somewhere else than in its folder."""

    def loss(self, unit: str, iteration: int, value: float) -> None:
        """One point of a unit's loss curve; `unit` says the phase of learning too: `weights/mid_block.resnets.0`."""
        ...

    def curve(self, name: str, axis: str, points: Points) -> None:
        """Whole curves: at each place of the axis (a timestep, a step) the value of every curve by its name."""
        ...

    def table(self, name: str, rows: Rows) -> None:
        """A table."""
        ...

    def image(self, name: str, path: Path) -> None:
        """A picture."""
        ...

    def summary(self, values: Mapping[str, Any]) -> None:
        """Final numbers, some of them or all."""
        ...

    def close(self, *, failed: bool) -> None:
        """The run is over."""
        ...

    def where(self) -> Sequence[str]:
        """Lines that say where the run is now and how to look at it; asked for once it is closed."""
        ...


class LoggerConfig(Protocol):
    """A file of `conf/logger/`: which mirror, and how it is set."""

    def open(self, run: RunMetadata) -> Logger:
        """The mirror of one run."""
        ...


class NullLogger:
    """Files only."""

    def loss(self, unit: str, iteration: int, value: float) -> None:
        """Nothing."""

    def curve(self, name: str, axis: str, points: Points) -> None:
        """Nothing."""

    def table(self, name: str, rows: Rows) -> None:
        """Nothing."""

    def image(self, name: str, path: Path) -> None:
        """Nothing."""

    def summary(self, values: Mapping[str, Any]) -> None:
        """Nothing."""

    def close(self, *, failed: bool) -> None:
        """Nothing."""

    def where(self) -> Sequence[str]:
        """Nowhere else."""
        return ()


@dataclass(frozen=True)
class NoLogger:
    """The choice of no mirror."""

    def open(self, run: RunMetadata) -> NullLogger:
        """None."""
        return NullLogger()

"""Loggers: dashboards that show a run outside its folder. All that they show is in the run folder as well."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
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


@dataclass(frozen=True)
class NoLogger:
    """Settings for the run folder alone."""

    def open(self, run: RunMetadata) -> Logger:
        return Logger()


def _forward(method: str) -> Callable[..., None]:
    def call(self: "LoggerCollection", *args: Any) -> None:
        for logger in self.loggers:
            getattr(logger, method)(*args)

    return call


class LoggerCollection(Logger):
    """Forwards every call to each of its loggers."""

    def __init__(self, loggers: Sequence[Logger]) -> None:
        self.loggers = tuple(loggers)

    log_loss = _forward("log_loss")
    log_curve = _forward("log_curve")
    log_table = _forward("log_table")
    log_image = _forward("log_image")
    log_summary = _forward("log_summary")

    def close(self, *, failed: bool) -> None:
        """Close each, also where another one fails to."""
        with ExitStack() as stack:
            for logger in self.loggers:
                stack.callback(logger.close, failed=failed)

    def locations(self) -> list[str]:
        return [line for logger in self.loggers for line in logger.locations()]


class LoggersConfig:
    """Settings of several loggers, each under a name of its own."""

    def __init__(self, **configs: LoggerConfig) -> None:
        self.configs = configs

    def open(self, run: RunMetadata) -> LoggerCollection:
        """Start all of them, or none: those that are open are closed when one fails to open."""
        opened: list[Logger] = []
        with ExitStack() as stack:
            for config in self.configs.values():
                opened.append(config.open(run))
                stack.callback(opened[-1].close, failed=True)
            stack.pop_all()
        return LoggerCollection(opened)

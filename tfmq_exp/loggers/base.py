"""Loggers: dashboards that show a run outside its folder. All that they show is in the run folder as well."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
    """A dashboard of one run, or its settings (`conf/logger/`). It shows nothing but by what is overridden."""

    def open(self, run: RunMetadata) -> "Logger":
        """Start the logger of one run; returns it."""
        return self

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


def _forward(method: str) -> Callable[..., None]:
    def call(self: "LoggerCollection", *args: Any) -> None:
        for logger in self.loggers.values():
            getattr(logger, method)(*args)

    return call


class LoggerCollection(Logger):
    """Several loggers, each under a name of its own: every call goes to each of them."""

    def __init__(self, **loggers: Logger) -> None:
        self.loggers = loggers

    def open(self, run: RunMetadata) -> "LoggerCollection":
        """Start all of them, or none: those that are open are closed when one fails to open."""
        opened: dict[str, Logger] = {}
        with ExitStack() as stack:
            for name, logger in self.loggers.items():
                opened[name] = logger.open(run)
                stack.callback(opened[name].close, failed=True)
            stack.pop_all()
        return LoggerCollection(**opened)

    log_loss = _forward("log_loss")
    log_curve = _forward("log_curve")
    log_table = _forward("log_table")
    log_image = _forward("log_image")
    log_summary = _forward("log_summary")

    def close(self, *, failed: bool) -> None:
        """Close each, also where another one fails to."""
        with ExitStack() as stack:
            for logger in self.loggers.values():
                stack.callback(logger.close, failed=failed)

    def locations(self) -> list[str]:
        return [line for logger in self.loggers.values() for line in logger.locations()]

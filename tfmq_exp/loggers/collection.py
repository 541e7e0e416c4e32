"""Several mirrors at once."""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from tfmq_exp.loggers.base import Logger, LoggerConfig, Points, Rows, RunMetadata


class LoggerCollection:
    """Tells each of its mirrors what it is told."""

    def __init__(self, mirrors: Sequence[Logger]) -> None:
        self.mirrors = tuple(mirrors)

    def loss(self, unit: str, iteration: int, value: float) -> None:
        """To each."""
        for mirror in self.mirrors:
            mirror.loss(unit, iteration, value)

    def curve(self, name: str, axis: str, points: Points) -> None:
        """To each."""
        for mirror in self.mirrors:
            mirror.curve(name, axis, points)

    def table(self, name: str, rows: Rows) -> None:
        """To each."""
        for mirror in self.mirrors:
            mirror.table(name, rows)

    def image(self, name: str, path: Path) -> None:
        """To each."""
        for mirror in self.mirrors:
            mirror.image(name, path)

    def summary(self, values: Mapping[str, Any]) -> None:
        """To each."""
        for mirror in self.mirrors:
            mirror.summary(values)

    def close(self, *, failed: bool) -> None:
        """Each, also where another one fails to."""
        with ExitStack() as closing:
            for mirror in self.mirrors:
                closing.callback(mirror.close, failed=failed)

    def where(self) -> list[str]:
        """What each says."""
        return [line for mirror in self.mirrors for line in mirror.where()]


class LoggersConfig:
    """The choice of several mirrors, each under a name of its own."""

    def __init__(self, **choices: LoggerConfig) -> None:
        self.choices = choices

    def open(self, run: RunMetadata) -> LoggerCollection:
        """All of them, or none: those that are open are closed when one fails to open."""
        opened: list[Logger] = []
        try:
            for choice in self.choices.values():
                opened.append(choice.open(run))
        except BaseException:
            LoggerCollection(opened).close(failed=True)
            raise
        return LoggerCollection(opened)

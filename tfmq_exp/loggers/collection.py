"""Several loggers at once."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

from tfmq_exp.loggers.base import Logger, LoggerConfig, RunMetadata


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
        try:
            for config in self.configs.values():
                opened.append(config.open(run))
        except BaseException:
            LoggerCollection(opened).close(failed=True)
            raise
        return LoggerCollection(opened)

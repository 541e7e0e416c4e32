"""Helpers for tests of loggers."""

from pathlib import Path
from typing import Any

from tfmq_exp.loggers.base import Logger, RunMetadata


class RecordingLogger(Logger):
    """Records its calls."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []

    def log_loss(self, unit: str, iteration: int, value: float) -> None:
        self.calls.append(("loss", unit, iteration, value))

    def close(self, *, failed: bool) -> None:
        self.calls.append(("close", failed))

    def locations(self) -> list[str]:
        return [f"called {len(self.calls)} times"]


def metadata(folder: Path) -> RunMetadata:
    return RunMetadata(folder, "name", None, "tfmq", ("digits", "w4a8"), {"quant": "w4a8"}, {"seed": 3})

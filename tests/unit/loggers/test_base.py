"""Several loggers at once."""

from pathlib import Path

import pytest

from tests.helpers.loggers import RecordingLogger, metadata
from tfmq_exp.loggers.base import Logger, LoggerCollection, RunMetadata


class Opened(Logger):
    """Settings whose logger is known; without one it fails to open."""

    def __init__(self, logger: Logger | None) -> None:
        self.logger = logger

    def open(self, run: RunMetadata) -> Logger:
        if self.logger is None:
            raise OSError("cannot be opened")
        return self.logger


def test_every_call_reaches_all_loggers_and_all_are_closed(tmp_path: Path) -> None:
    one, other = RecordingLogger(), RecordingLogger()
    both = LoggerCollection(one=Opened(one), other=Opened(other), files=Logger()).open(metadata(tmp_path))
    both.log_loss("weights/a", 1, 0.5)

    class Stuck(Logger):
        def close(self, *, failed: bool) -> None:
            raise OSError("stuck")

    with pytest.raises(OSError, match="stuck"):
        LoggerCollection(stuck=Stuck(), both=both, other=Stuck()).close(failed=True)
    assert one.calls == other.calls == [("loss", "weights/a", 1, 0.5), ("close", True)]
    assert both.locations() == ["called 2 times"] * 2


def test_a_logger_is_closed_when_the_next_cannot_be_opened(tmp_path: Path) -> None:
    logger = RecordingLogger()
    with pytest.raises(OSError, match="cannot be opened"):
        LoggerCollection(one=Opened(logger), other=Opened(None)).open(metadata(tmp_path))
    assert logger.calls == [("close", True)]

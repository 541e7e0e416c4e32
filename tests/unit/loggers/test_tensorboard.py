"""TensorBoard without its package."""

import sys
from pathlib import Path

import pytest

from tests.helpers.loggers import metadata
from tfmq_exp.loggers.tensorboard import TensorBoard


def test_without_tensorboard_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(RuntimeError, match=r"'\.\[tensorboard\]'"):
        TensorBoard().open(metadata(tmp_path))

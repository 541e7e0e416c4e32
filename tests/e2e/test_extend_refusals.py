"""What an extension gets wrong is named."""

import importlib
import sys
from pathlib import Path

import pytest
from hydra.errors import MissingConfigException

from tests.e2e.jobs import composed
from tests.e2e.test_extend import PAGE, lab, run, searched  # noqa: F401 - fixtures

pytestmark = pytest.mark.filterwarnings("ignore::Warning:pytorch_lightning")


def failure(capsys: pytest.CaptureFixture[str], lab: Path, folder: Path, *overrides: str) -> str:
    capsys.readouterr()
    with pytest.raises(SystemExit):
        run(lab, folder, "method=nearest", "method/scales=envelope", *overrides)
    return next(line for line in capsys.readouterr().out.splitlines() if line.startswith("error:"))


def test_a_wrong_name_lists_the_right_ones(lab: Path, tmp_path: Path) -> None:
    with pytest.raises(MissingConfigException) as error:
        composed(tmp_path, searched(lab), "method=tfmq_ptqt")
    assert "Could not find 'method/tfmq_ptqt'" in PAGE
    assert "Could not find 'method/tfmq_ptqt'" in str(error.value)
    assert "tfmq_ptqd" in str(error.value)
    assert str(lab / "conf") in str(error.value)


def test_what_is_wrong_in_a_record(lab: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = failure(capsys, lab, tmp_path, "+method.scales.default.radios=2")
    assert said.removeprefix("error: ") in PAGE


def test_a_package_that_python_does_not_find(
    lab: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path != str(lab)])
    for name in [name for name in sys.modules if name.partition(".")[0] == "ideas"]:
        monkeypatch.delitem(sys.modules, name)
    said = failure(capsys, lab, tmp_path)
    for part in ("Error loading 'ideas.envelope.EnvelopeConfig'", "No module named 'ideas'"):
        assert part in PAGE
        assert part in said


def test_a_scale_that_cannot_be_stored(
    lab: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = importlib.import_module("ideas.envelope").EnvelopeConfig
    monkeypatch.setattr(config, "tabulated", lambda self: self)
    said = failure(capsys, lab, tmp_path, "until=activations")
    assert "cannot be stored; classes that can:" in PAGE
    assert "cannot be stored; classes that can:" in said

"""The scripts, run as a user runs them but inside the test process."""

import csv
import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.smoke.jobs import job
from tfmq_exp.denoisers.digits import DigitClassifier, load_classifier

ROOT = Path(__file__).parents[2]
REFERENCE = ROOT / "tests/goldens/reference_run/ldm"


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def call(monkeypatch: pytest.MonkeyPatch, name: str, *arguments: str) -> int | None:
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *arguments])
    return script(name).main()


def test_training_resumes_and_keeps_its_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    places = ("--out", str(tmp_path / "out"), "--weights", str(tmp_path / "weights"), "--batch", "4")
    call(monkeypatch, "train_digits", "classifier", "--steps", "100", *places)
    first = load_file(tmp_path / "weights/classifier.safetensors")
    call(monkeypatch, "train_digits", "classifier", "--steps", "150", *places)
    steps = [
        int(row["step"]) for row in csv.DictReader((tmp_path / "weights/classifier.log.csv").open()) if row["loss"]
    ]
    assert steps == [49, 99, 149]
    second = load_file(tmp_path / "weights/classifier.safetensors")
    assert any(not torch.equal(first[name], second[name]) for name in first)
    record = json.loads((tmp_path / "weights/classifier.json").read_text())
    _, sha256 = load_classifier(str(tmp_path / "weights/classifier.safetensors"))
    assert record["sha256"] == sha256
    assert record["parameters"] == sum(p.numel() for p in DigitClassifier().parameters())


def test_the_shipped_weights_are_those_of_their_records() -> None:
    import hashlib

    weights = ROOT / "tfmq_exp/denoisers/weights"
    for record in weights.glob("*.json"):
        wanted = json.loads(record.read_text())["sha256"]
        assert hashlib.sha256((weights / f"{record.stem}.safetensors").read_bytes()).hexdigest() == wanted


def test_tables_from_run_folders(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    job(tmp_path, "runtime=smoke", "method=nearest")
    capsys.readouterr()
    assert call(monkeypatch, "make_tables", str(tmp_path)) == 0
    said = capsys.readouterr().out
    assert "| fp32 | float |" in said
    assert "| w4a8 | nearest |" in said
    assert "simulated quantization" in said
    assert call(monkeypatch, "make_tables", str(tmp_path / "nothing")) == 1
    assert "no results.json" in capsys.readouterr().err


def test_the_comparison_with_the_original_program(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """At two iterations only what does not depend on learning can hold: float outputs and sizes."""
    call(monkeypatch, "compare_reference", str(REFERENCE), "--iterations", "2")
    said = capsys.readouterr().out
    assert "86.0% of all" in said
    assert "MISSED" not in said


def test_a_reference_folder_that_lacks_a_file_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    save_file({"x": torch.zeros(1)}, tmp_path / "init_state.safetensors")
    with pytest.raises(SystemExit):
        call(monkeypatch, "compare_reference", str(tmp_path))
    assert "reference.json" in capsys.readouterr().err

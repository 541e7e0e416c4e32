"""What is kept of unfinished work comes back as it was."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tfmq_exp.loggers.base import Logger
from tfmq_exp.pipeline.store import DamagedEntry, Store
from tfmq_exp.pipeline.unit_checkpoints import (
    FileUnitCheckpointer,
    LoggingCallback,
    add_point,
    load_result,
    save_result,
    unit_reports,
)
from tfmq_exp.quant.layers import QuantizedWeight
from tfmq_exp.quant.spec import QParams, QuantSpec
from tfmq_exp.reconstruction.context import UnitReport, UnitResult

REPORT = UnitReport("a", "residual", 2, 24, 0.5, 0.25, 1.0, 100.0)


def weight(bits: int, seed: int) -> QuantizedWeight:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 2**bits, (3, 4), generator=generator).to(torch.uint8)
    return QuantizedWeight(codes, QParams(torch.rand(3, 1, generator=generator), torch.ones(3, 1)), QuantSpec(bits))


def learned(seed: int = 0) -> UnitResult:
    state = {"conv.input_quantizer.scale_provider.scale": torch.tensor([0.5 + seed]), "conv.other": torch.arange(3.0)}
    return UnitResult({"conv": (weight(4, seed),), "conv_shortcut": (weight(4, seed), weight(8, seed + 1))}, state)


def same(one: UnitResult, other: UnitResult) -> bool:
    if one.integers.keys() != other.integers.keys() or one.activations.keys() != other.activations.keys():
        return False
    weights = [
        a.spec == b.spec and torch.equal(a.codes, b.codes) and all(map(torch.equal, a.qparams, b.qparams))
        for layer in one.integers
        for a, b in zip(one.integers[layer], other.integers[layer], strict=True)
    ]
    return all(weights) and all(torch.equal(x, other.activations[name]) for name, x in one.activations.items())


def test_everything_learned_and_its_note_survive_the_file(tmp_path: Path) -> None:
    save_result(tmp_path / "file", learned(), {"a": [1, None]})
    back, note = load_result(tmp_path / "file")
    assert same(back, learned())
    assert not same(back, learned(1))
    assert note == {"a": [1, None]}


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    save_result(tmp_path / "file", learned(), {})
    (tmp_path / "file").write_bytes((tmp_path / "file").read_bytes()[:-7])
    with pytest.raises(ValueError, match="file is truncated: it begins as safetensors"):
        load_result(tmp_path / "file")


def test_work_that_goes_over_the_same_units_again_keeps_them_apart(tmp_path: Path) -> None:
    files = FileUnitCheckpointer(tmp_path / "units", {})
    files.put("a", learned(), REPORT)
    files.scoped("again").put("a", learned(1), dataclasses.replace(REPORT, error_after=0.125))
    assert FileUnitCheckpointer(tmp_path / "units", {}).get("b") is None
    assert files.scoped("other").get("a") is None
    kept = (
        FileUnitCheckpointer(tmp_path / "units", {}).get("a"),
        FileUnitCheckpointer(tmp_path / "units", {}).scoped("again").get("a"),
    )
    assert all(found is not None and same(found, learned(seed)) for seed, found in enumerate(kept))
    files.write_reports(tmp_path)
    reports = json.loads((tmp_path / "units.json").read_text())
    assert [row["error_after"] for row in reports] == [0.25, 0.125]
    assert reports[0] == dataclasses.asdict(REPORT)
    assert json.loads((tmp_path / "losses.json").read_text()) == []


@pytest.mark.parametrize(("every", "of"), [(1, 5), (10, 95), (10, 20_000), (1, 100), (7, 1234)])
def test_a_curve_is_thinned_and_keeps_its_ends(every: int, of: int) -> None:
    numbers = sorted({*range(every, of + 1, every), of})
    curve: list[dict[str, Any]] = []
    kept = [number for number in numbers if add_point(curve, {"iteration": number, "loss": number / of}, of)]
    assert kept == [row["iteration"] for row in curve]
    assert (kept[0], kept[-1]) == (numbers[0], of)
    assert len(kept) <= 101
    assert len(kept) >= min(len(numbers), 90) or kept == numbers
    assert curve[-1] == {"iteration": of, "loss": 1.0}


def test_a_curve_is_kept_with_its_unit_and_found_again(tmp_path: Path) -> None:
    """Two times around, and a process that goes on after the first: rows are those that were seen, the result is the same."""
    entry = Store(tmp_path).entry("weights", {})
    entry.path.mkdir(parents=True)
    mirror = Curves()
    for part in (False, True):
        watcher = LoggingCallback(lambda done, note: None, mirror, "weights")
        for _ in range(1 + part):
            watcher.on_start(1)
        files = FileUnitCheckpointer(entry.path / "units", watcher.curves)
        watcher.on_iteration_end("a", 10, 10, 0.5 + part)
        (files.scoped("again") if part else files).put("a", learned(), REPORT)
    files.write_reports(entry.path)
    entry.finish()
    rows = unit_reports([entry, Store(tmp_path).entry("activations", {})], "losses.json")
    names = [(row["phase"], row["unit"], row["loss"]) for row in rows]
    assert names == [("weights", "a", 0.5), ("weights 2", "a", 1.5)]
    assert list(rows[0]) == ["phase", "unit", "iteration", "loss"]
    assert [f"{phase}/{unit}" for phase, unit, _ in names] == mirror.names
    assert unit_reports([entry], "units.json")[0] == {"phase": "weights", **dataclasses.asdict(REPORT)}
    notes = entry.path / "units.json"
    notes.write_text(notes.read_text().replace("0.25", "0.26"))
    with pytest.raises(DamagedEntry, match=r"units\.json"):
        unit_reports([entry], "units.json")


class Curves(Logger):
    """Notes the loss curves."""

    def __init__(self) -> None:
        self.names: list[str] = []

    def log_loss(self, unit: str, iteration: int, value: float) -> None:
        self.names.append(unit)


def test_curves_of_a_unit_are_apart_by_phase_and_round() -> None:
    curves, shown = Curves(), list[tuple[float, str]]()
    for phase in ("weights", "activations"):
        watcher = LoggingCallback(lambda done, note: shown.append((done, note)), curves, phase)
        watcher.on_progress("ranges", 1, 4)
        for _ in range(2):
            watcher.on_start(2)
            watcher.on_iteration_end("a", 5, 10, 1.0)
    assert len(set(curves.names)) == len(curves.names) == 4
    assert shown[0] == (0.25, "ranges")
    assert shown[1][0] == 0.25

"""What is kept of unfinished work comes back as it was."""

import dataclasses
from pathlib import Path

import pytest
import torch

from tfmq_exp.experiment.keeping import UnitFiles, UnitProgress, load_learned, save_learned
from tfmq_exp.experiment.tracking import NoMirror
from tfmq_exp.quant.layers import QuantizedWeight
from tfmq_exp.quant.spec import QParams, QuantSpec
from tfmq_exp.reconstruction.report import Learned, UnitReport

REPORT = UnitReport("a", "residual", 2, 24, 0.5, 0.25, 1.0, 100.0)


def weight(bits: int, seed: int) -> QuantizedWeight:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 2**bits, (3, 4), generator=generator).to(torch.uint8)
    return QuantizedWeight(codes, QParams(torch.rand(3, 1, generator=generator), torch.ones(3, 1)), QuantSpec(bits))


def learned(seed: int = 0) -> Learned:
    state = {"conv.input_quantizer.source.scale": torch.tensor([0.5 + seed]), "conv.other": torch.arange(3.0)}
    return Learned({"conv": (weight(4, seed),), "conv_shortcut": (weight(4, seed), weight(8, seed + 1))}, state)


def same(one: Learned, other: Learned) -> bool:
    if one.integers.keys() != other.integers.keys() or one.activations.keys() != other.activations.keys():
        return False
    weights = [
        a.spec == b.spec and torch.equal(a.codes, b.codes) and all(map(torch.equal, a.qparams, b.qparams))
        for site in one.integers
        for a, b in zip(one.integers[site], other.integers[site], strict=True)
    ]
    return all(weights) and all(torch.equal(x, other.activations[name]) for name, x in one.activations.items())


def test_everything_learned_and_its_note_survive_the_file(tmp_path: Path) -> None:
    save_learned(tmp_path / "file", learned(), {"a": [1, None]})
    back, note = load_learned(tmp_path / "file")
    assert same(back, learned())
    assert not same(back, learned(1))
    assert note == {"a": [1, None]}


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    save_learned(tmp_path / "file", learned(), {})
    (tmp_path / "file").write_bytes((tmp_path / "file").read_bytes()[:-7])
    with pytest.raises(ValueError, match=r"file is damaged.*delete it"):
        load_learned(tmp_path / "file")


def test_work_that_goes_over_the_same_units_again_keeps_them_apart(tmp_path: Path) -> None:
    files = UnitFiles(tmp_path / "units")
    files.put("a", learned(), REPORT)
    files.part("again").put("a", learned(1), dataclasses.replace(REPORT, error_after=0.125))
    assert UnitFiles(tmp_path / "units").get("b") is None
    assert files.part("other").get("a") is None
    kept = UnitFiles(tmp_path / "units").get("a"), UnitFiles(tmp_path / "units").part("again").get("a")
    assert all(found is not None and same(found, learned(seed)) for seed, found in enumerate(kept))
    assert [row["error_after"] for row in files.reports()] == [0.25, 0.125]
    assert files.reports()[0] == dataclasses.asdict(REPORT)


class Curves(NoMirror):
    """Notes the loss curves."""

    def __init__(self) -> None:
        self.names: list[str] = []

    def loss(self, unit: str, iteration: int, value: float) -> None:
        self.names.append(unit)


def test_curves_of_a_unit_are_apart_by_phase_and_round() -> None:
    curves, shown = Curves(), list[tuple[float, str]]()
    for phase in ("weights", "activations"):
        watcher = UnitProgress(lambda done, note: shown.append((done, note)), curves, phase)
        watcher.progress("ranges", 1, 4)
        for _ in range(2):
            watcher.start(2)
            watcher.iteration("a", 5, 10, 1.0)
    assert len(set(curves.names)) == len(curves.names) == 4
    assert shown[0] == (0.25, "ranges")
    assert shown[1][0] == 0.25

"""Random streams, tensors, images and scores of three small runs are those that were recorded."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.e2e.jobs import job

ROOT = Path(__file__).parents[2]
RECORDED = json.loads((ROOT / "tests/goldens/frozen_numbers.json").read_text(encoding="utf-8"))
pytestmark = pytest.mark.filterwarnings("ignore::Warning:pytorch_lightning")


def test_a_change_of_structure_changes_no_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [str(ROOT / "scripts"), *sys.path])
    import frozen_numbers

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        found: dict[str, Any] = {
            name: frozen_numbers.numbers(job, name, tmp_path) for name in RECORDED if name != "machine"
        }
    finally:
        torch.set_num_threads(threads)
    assert len(found) == 3
    for name, numbers in found.items():
        recorded = RECORDED[name]
        assert numbers["streams"] == recorded["streams"], name
        shapes = [line.rpartition(" ")[0] for line in recorded["model"]]
        assert [line.rpartition(" ")[0] for line in numbers["model"]] == shapes, name
        if frozen_numbers.machine() == RECORDED["machine"]:  # sums of another processor differ in the last bits
            assert numbers == recorded, name
        for row, expected in zip(numbers["errors"], recorded["errors"], strict=True):
            assert row == pytest.approx(expected, rel=0.05), name

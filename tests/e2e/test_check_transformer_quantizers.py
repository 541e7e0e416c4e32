"""The comparison of the quantizers with the numbers of Q-DiT, PTQ4DiT, SVDQuant and ViDiT-Q, as a user runs it."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.test_check_goldens import add, change, script

GOLDENS = Path(__file__).parents[1] / "goldens/transformers/quantizers"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The part of the quantizers alone."""
    shutil.copytree(GOLDENS, tmp_path / "quantizers")
    return tmp_path


def failed(folder: Path) -> set[str]:
    return {group.name for group in script.check_transformers(folder) if not group.ok}


def test_every_number_agrees(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert script.main(["transformers", str(folder)]) == 0
    said = capsys.readouterr().out
    assert "FAILED" not in said
    for what in (
        "qdit: weights, mse",
        "qdit: activations",
        "qdit: channel groups",
        "gptq: groups",
        "ptq4dit: balance",
        "ptq4dit w4a8: weight grids",
        "ptq4dit w4a8: outputs",
        "svdquant: errors of the search",
        "svdquant: branches",
        "viditq: outputs",
    ):
        assert f"{what} " in said


def test_wrong_numbers_fail_where_they_are_and_nowhere_else(folder: Path) -> None:
    part = folder / "quantizers"
    change(part / "qdit.safetensors", add("weight.b4.g32.asym.mse.cg1.clip1.0", 1, 2))
    change(part / "gptq.safetensors", add("b3.g64.asym", 2, 3))
    change(part / "ptq4dit.safetensors", lambda tensors: tensors["w4a8.blocks.1.attn.v.delta"].mul_(1.01))
    change(part / "svdquant.safetensors", lambda tensors: tensors["search10.errors"].mul_(1.001))
    change(part / "viditq.safetensors", lambda tensors: tensors["w8a8.alphaNone.weight_zero"].add_(1))
    assert failed(folder) == {
        "qdit: weights, mse",
        "gptq: groups",
        "ptq4dit w4a8: activation scales",
        "svdquant: errors of the search",
        "viditq: weight zero points",
    }


def test_a_wrong_setting_fails(folder: Path) -> None:
    def without_groups(settings: dict[str, Any]) -> None:
        settings["cases"]["b3.g64.asym"]["group"] = 32

    change(folder / "quantizers/gptq.json", without_groups)
    change(folder / "quantizers/svdquant.json", lambda settings: settings.update({"rank": 7}))
    found = failed(folder)
    assert {"gptq: groups", "svdquant: branches", "svdquant: errors of the iterations"} <= found
    assert not [name for name in found if name.startswith(("qdit", "ptq4dit", "viditq"))]


def test_programs_are_compared_alone_and_their_tensors_all_of_them(folder: Path) -> None:
    part = folder / "quantizers"
    for file in part.iterdir():
        if file.name.split(".")[0] not in ("qdit", "viditq"):
            file.unlink()
    assert failed(folder) == set()
    change(part / "viditq.safetensors", lambda tensors: tensors.update(unknown=tensors["bias"].clone()))
    assert failed(folder) == {"quantizers: tensors read"}


@pytest.mark.parametrize("damage", ["settings", "tensors", "tensor", "case", "group", "all"])
def test_damaged_folders_give_one_line(folder: Path, damage: str, capsys: pytest.CaptureFixture[str]) -> None:
    part = folder / "quantizers"
    keep = {"group": "qdit"}.get(damage, "viditq")
    for file in part.iterdir():
        if file.name.split(".")[0] != keep or damage == "all":
            file.unlink()
    if damage == "settings":
        (part / "viditq.json").unlink()
    if damage == "tensors":
        (part / "viditq.safetensors").write_bytes(b"no tensors")
    if damage == "tensor":
        change(part / "viditq.safetensors", lambda tensors: tensors.pop("bias"))
    if damage == "case":
        change(part / "viditq.json", lambda settings: settings["cases"]["w8a8.alphaNone"].pop("act_bits"))
    if damage == "group":
        cases = json.loads((part / "qdit.json").read_text())["cases"]
        change(part / "qdit.json", lambda settings: settings["cases"][min(cases)].update(group=7))
    assert script.main(["transformers", str(folder)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1

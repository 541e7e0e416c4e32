"""Our arithmetic against the original program's, through the script that users run."""

import importlib.util
import json
import shutil
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

ROOT = Path(__file__).parents[3]
GOLDENS = ROOT / "tests" / "goldens" / "quantizers"
SPEC = importlib.util.spec_from_file_location("check_goldens", ROOT / "scripts" / "check_goldens.py")
script = importlib.util.module_from_spec(SPEC)


@pytest.fixture(scope="module", autouse=True)
def load_script():
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "check_goldens", script)  # dataclasses look their module up
        SPEC.loader.exec_module(script)
        yield


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    return Path(shutil.copytree(GOLDENS, tmp_path / "goldens"))


def failed(folder: Path) -> list[str]:
    return [group.name for group in script.check_quantizers(folder) if not group.ok]


def test_every_group_agrees_with_the_original(capsys):
    assert script.main(["quantizers", str(GOLDENS)]) == 0
    assert failed(GOLDENS) == []
    printed = capsys.readouterr().out
    assert "minmax" in printed
    assert "FAILED" not in printed


def test_a_single_wrong_value_fails_its_group(copy, capsys):
    tensors = load_file(copy / "scalers.safetensors")
    tensors["scaler.conv_gauss/cw.dq"][3, 2, 1, 0, 0] += 1e-3
    save_file(tensors, copy / "scalers.safetensors")
    assert failed(copy) == ["scaler minmax"]
    assert script.main(["quantizers", str(copy)]) == 1
    assert "FAILED" in capsys.readouterr().out


def test_a_tensor_that_nothing_compares_fails(copy):
    tensors = load_file(copy / "running.safetensors")
    tensors["running.unheard_of"] = tensors["running.normal.x"].clone()
    save_file(tensors, copy / "running.safetensors")
    assert failed(copy) == ["tensors read"]


@pytest.mark.parametrize("damage", ["folder", "truncated", "lacking tensor", "lacking setting"])
def test_damaged_folders_give_one_line(copy, damage, capsys):
    if damage == "folder":
        shutil.rmtree(copy)
    elif damage == "truncated":
        file = copy / "tib.safetensors"
        file.write_bytes(file.read_bytes()[:1000])
    elif damage == "lacking tensor":
        (copy / "running.safetensors").unlink()
    else:
        meta = json.loads((copy / "meta.json").read_text())
        del meta["running"][0]["momentum"]
        (copy / "meta.json").write_text(json.dumps(meta))
    assert script.main(["quantizers", str(copy)]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1

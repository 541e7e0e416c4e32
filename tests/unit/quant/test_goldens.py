"""Our arithmetic against the original program's, through the script that users run."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

ROOT = Path(__file__).parents[3]
GOLDENS = ROOT / "tests" / "goldens" / "quantizers"


def check(folder: Path) -> subprocess.CompletedProcess[str]:
    script = ROOT / "scripts" / "check_goldens.py"
    return subprocess.run(
        [sys.executable, script, "quantizers", folder], capture_output=True, text=True, env={"COLUMNS": "200"}
    )


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    return Path(shutil.copytree(GOLDENS, tmp_path / "goldens"))


def test_every_group_agrees_with_the_original():
    result = check(GOLDENS)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "FAILED" not in result.stdout
    for group in ("minmax", "mse", "kl", "hist", "running", "AdaRound", "temporal block", "split", "attention", "timesteps"):
        assert group in result.stdout


def test_a_single_wrong_value_fails(copy):
    tensors = load_file(copy / "scalers.safetensors")
    tensors["scaler.conv_gauss/cw.dq"][3, 2, 1, 0, 0] += 1e-3
    save_file(tensors, copy / "scalers.safetensors")
    result = check(copy)
    assert result.returncode == 1
    assert result.stdout.count("FAILED") == 1


def test_a_tensor_that_nothing_compares_fails(copy):
    tensors = load_file(copy / "running.safetensors")
    save_file(tensors | {"running.unheard_of": tensors["running.normal.x"]}, copy / "running.safetensors")
    result = check(copy)
    assert result.returncode == 1
    assert "running.unheard_of" in result.stdout


@pytest.mark.parametrize("damage", ["folder", "truncated", "lacking tensor", "lacking setting"])
def test_damaged_folders_give_one_line(copy, damage):
    if damage == "folder":
        shutil.rmtree(copy)
    elif damage == "truncated":
        file = copy / "tib.safetensors"
        file.write_bytes(file.read_bytes()[:1000])
    elif damage == "lacking tensor":
        (copy / "adaround.safetensors").unlink()
    else:
        meta = json.loads((copy / "meta.json").read_text())
        del meta["running"][0]["momentum"]
        (copy / "meta.json").write_text(json.dumps(meta))
    result = check(copy)
    assert result.returncode == 2
    assert len(result.stderr.splitlines()) == 1

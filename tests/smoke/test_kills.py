"""Runs that are killed, and files whose bits turn: a short form of `scripts/check_resume.py`."""

import random
from pathlib import Path
from typing import Any

import pytest

from tests.smoke.test_scripts import script
from tfmq_exp.experiment.store import DamagedEntry, Entry

RUNS = {
    "nearest": ("method=nearest", "quant=w8a8", "goal=images"),
    "brecq": ("method=brecq", "goal=activations"),
    "lsq": ("method=lsq", "quant=w4a4", "runtime.checkpoint_minutes=0", "goal=weights"),
}


@pytest.fixture
def check(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The script, with a few small runs."""
    module = script("check_resume")
    monkeypatch.setattr(module, "CONFIGURATIONS", RUNS)
    return module


def test_runs_killed_at_random_moments_end_as_undisturbed_ones(
    check: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(check, "CONFIGURATIONS", {"nearest": RUNS["nearest"]})
    assert check.kills(tmp_path, 4, random.Random(0)) == []
    assert "nearest | 4 | " in capsys.readouterr().out


def turn(path: Path, draw: random.Random) -> None:
    content = bytearray(path.read_bytes())
    bit = draw.randrange(8 * len(content))
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("name", "pattern", "files"),
    [("brecq", "weights/*/units/*.safetensors", 5), ("lsq", "weights/*/checkpoints/*.ckpt", 1)],
)
def test_a_bit_turns_in_every_file(check: Any, tmp_path: Path, name: str, pattern: str, files: int) -> None:
    """What a broken-off stage has left is made again; a file of a finished stage is named."""
    wanted, _ = check.undisturbed(tmp_path, name)
    folder, draw = tmp_path / "broken", random.Random(1)
    check.broken_off(folder, name, pattern, files)
    assert len(list(folder.glob(f"store/{pattern}"))) >= files
    for path in [path for path in folder.glob("store/weights/*/**/*") if path.is_file() and path.stat().st_size]:
        turn(path, draw)
    outcome = check.finish(check.start(folder, RUNS[name]), folder)
    assert outcome.status == 0, outcome.said
    assert check.differences(folder, wanted) == ""
    assert "is damaged: it is made again" in (folder / "run/run.log").read_text()

    for manifest in folder.glob("store/*/*/manifest.json"):
        entry = Entry(manifest.parts[-3], manifest.parts[-2], manifest.parent, {})
        for path in [path for path in entry.path.rglob("*") if path.is_file()]:
            content = path.read_bytes()
            turn(path, draw)
            with pytest.raises(DamagedEntry, match=path.name):
                entry.verify()
            path.write_bytes(content)

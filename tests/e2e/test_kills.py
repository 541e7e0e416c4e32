"""Runs that are killed, and files whose bits turn: a short form of `scripts/check_resume.py`."""

import random
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.jobs import composed
from tests.e2e.test_scripts import script
from tfmq_exp.cli.job import perform
from tfmq_exp.cli.status import read_status
from tfmq_exp.core.files import read_record
from tfmq_exp.pipeline.store import DamagedEntry, Entry

pytestmark = pytest.mark.bad_input

RUNS = {
    "nearest": ("method=nearest", "quant=w8a8", "until=images"),
    "brecq": ("method=brecq", "until=activations"),
    "lsq": ("method=lsq", "quant=w4a4", "runtime.checkpoint_every_min=0", "until=weights"),
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
    assert check.kills(tmp_path, 3, random.Random(0)) == []
    assert "nearest | 3 | " in capsys.readouterr().out


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


def test_any_stage_that_is_deleted_is_made_again_and_the_job_is_found_after_that(check: Any, tmp_path: Path) -> None:
    """The record of every such run is that of the first: scores, keys, and the set of stages with their costs."""

    def rows(*wanted: str) -> list[Any]:
        perform(composed(tmp_path, "debug=smoke", "method=nearest", "quant=w8a8"))
        assert read_status(tmp_path / "run").state in wanted
        return [check.without_times(row) for row in read_record(tmp_path / "run/results.json")["rows"]]

    first = rows("done")
    stages = first[1]["keys"]
    assert stages == first[1]["cost"]["stages"]
    assert set(stages) == {
        *("trajectory", "weights", "activations", "images", "float images"),
        *("reference", "scores", "float scores", "diagnostics", "comparison"),
        *(f"float {kind} {stage}" for kind in ("batch", "bfloat16") for stage in ("images", "comparison")),
    }
    for name in stages:
        stage = name.split()[-1]
        shutil.rmtree(tmp_path / "store" / stage / stages[name])
        assert rows("done") == first
        assert (tmp_path / "store" / stage / stages[name] / "manifest.json").is_file(), name
    assert rows("found") == first

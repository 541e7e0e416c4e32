"""Runs that are damaged, unfinished, repeated or not there: the page says so, and goes on."""

import copy
import json
from pathlib import Path

import pytest
from filelock import FileLock
from tfmq_exp.report.html.runs import collect

from tests.unit.reporting.html_runs import Reader, read, row, run, table


@pytest.fixture(scope="module")
def broken(tmp_path_factory: pytest.TempPathFactory) -> Reader:
    root = tmp_path_factory.mktemp("broken")
    run(root / "0-whole")
    run(root / "1-other-bits", bits="w3a8")
    (run(root / "2-damaged", "b") / "results.json").write_text('{"rows": [')
    curves = run(root / "3-curves", "b", 1)
    (curves / "temporal_error.csv").write_text("step,t\n0,1\n")
    (curves / "trajectory_error.csv").write_bytes(b"\xff\xfe\x00")
    (curves / "samples.png").write_bytes(b"nothing")
    failed = run(root / "4-failed", "c")
    (failed / "results.json").unlink()
    (failed / "status.json").write_text(json.dumps({"state": "failed", "reason": "out of <b>memory</b></script>"}))
    killed = run(root / "5-killed", "c", 1)
    (killed / "results.json").unlink()
    (killed / "status.json").write_text(json.dumps({"state": "running", "pid": 77, "host": "here"}))
    (killed / ".running.lock").touch()
    (root / "6-begun" / ".hydra").mkdir(parents=True)
    endless = run(root / "7-endless", "d")
    table(endless / "temporal_error.csv", [{"t": 3, "relative_mse": "nan"}, {"t": 1, "relative_mse": "inf"}])
    odd = [row("e", "w4a8", 0, float("nan")), row("float", "fp32", 0, 1.0)]
    (run(root / "8-odd", "e") / "results.json").write_text(json.dumps({"rows": odd}))
    (root / "multirun.yaml").write_text("hydra: {overrides: {task: ['method=a,b,missed', 'seed=0,1']}, sweeper: null}")
    return read(root)


def test_what_is_damaged_or_unfinished_is_listed(broken: Reader) -> None:
    missing = broken.text.partition("What is missing")[2]
    missing = missing[missing.index("Runs without results") :]
    for said in (
        "2-damaged : results.json cannot be read",
        "3-curves : temporal_error.csv cannot be read: no column relative_mse; trajectory_error.csv cannot be read",
        "samples.png is no picture",
        "out of <b>memory</b></script>",
        "process 77 on here is gone",
        "6-begun unfinished",
        "8-odd : fid of w4a8 e, seed 0, is nan; trajectory of w4a8 e, seed 0, is nan",
    ):
        assert said in missing
    assert "9 runs: 6 done, 1 failed, 1 died, 1 unfinished" in broken.text.replace(" ,", ",")


def test_cells_without_a_run_are_named(broken: Reader) -> None:
    found = next(rows for rows in broken.tables.values() if [text for _, text in rows[0]][-1] == "seeds")
    gaps = {tuple(text for _, text in line[1:]) for line in found[1:]}
    assert ("w4a8", "missed", "0, 1") in gaps  # asked for, and nothing of it is there
    assert ("w3a8", "a", "1") in gaps
    assert ("w4a8", "a", "1") in gaps
    assert not any(gap[:2] == ("w4a8", "c") for gap in gaps)  # both seeds were begun


def test_a_job_that_holds_its_lock_is_at_work(tmp_path: Path) -> None:
    folder = run(tmp_path / "run")
    (folder / "status.json").write_text(json.dumps({"state": "running"}))
    with FileLock(folder / ".running.lock"):
        assert collect([tmp_path])[0].state == "running"
    (folder / ".running.lock").touch()
    assert collect([tmp_path])[0].state == "died"


def test_a_run_that_repeats_another_counts_once(tmp_path: Path) -> None:
    run(tmp_path / "0")
    (run(tmp_path / "1") / "status.json").write_text(json.dumps({"state": "found", "reason": "outputs/0"}))
    run(tmp_path / "2", seed=1)
    rows = read(tmp_path).tables["table-1"]
    assert [text for _, text in rows[2]][:3] == ["w4a8", "a", "2"]


def test_what_is_not_there_is_an_error_in_words(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no folder of a run at or below"):
        collect([tmp_path])
    with pytest.raises(ValueError, match="nowhere is not there"):
        collect([tmp_path / "nowhere"])


def test_the_store_and_what_lies_below_a_run_are_no_runs(tmp_path: Path) -> None:
    source = run(tmp_path / "sweeps" / "0")
    kept = copy.copy(source) / "wandb"
    kept.mkdir()
    (kept / "config.yaml").write_text("{}")
    stored = tmp_path / "store" / "jobs" / "0123" / "results"
    stored.mkdir(parents=True)
    (stored / "results.json").write_text("{}")
    (stored.parent / "manifest.json").write_text("{}")
    assert [run.name for run in collect([tmp_path])] == ["sweeps/0"]

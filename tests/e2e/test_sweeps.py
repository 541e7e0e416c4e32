"""Sweeps as a user starts them: one after the other, by joblib, by submitit; with jobs that fail, are killed, and are queued again."""

import json
import logging
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
import torch

from run import run as command
from tests.e2e.jobs import CONF, composed, job
from tfmq_exp.cli import main as app
from tfmq_exp.cli.job import attempt, perform
from tfmq_exp.cli.status import Status, read_status
from tfmq_exp.report.records import read_records

WAITING = CONF.parent / "tests" / "e2e" / "waiting.py"


@pytest.fixture
def kept_logging(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Hydra sets up logging for the process; other tests want theirs.

    Before that it shuts down what is there, where absl, which OpenVINO brings, would close the stream that pytest reads.
    """
    monkeypatch.setattr(logging, "shutdown", lambda *_: None)
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)


@pytest.fixture
def sweep(kept_logging: None, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """`python run.py -m ...` in this process; returns the exit status."""

    def start(*overrides: str) -> int:
        monkeypatch.setattr(sys, "argv", ["run.py", "-m", "--config-path", str(CONF), *overrides])
        try:
            command()
        except SystemExit as stop:
            return int(stop.code or 0)
        return 0

    return start


def last_sweep(outputs: Path) -> Path:
    return max(outputs.glob("sweeps/*/*"))


def manifests(store: Path) -> list[Path]:
    return list(store.glob("*/*/manifest.json"))


def statuses(outputs: Path) -> list[Status]:
    folders = last_sweep(outputs).glob("*-seed*")
    return sorted((read_status(folder) for folder in folders), key=lambda status: status.number or 0)


def test_a_failed_job_leaves_the_others_alone_and_a_second_sweep_finds_them(
    tmp_path: Path, sweep: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    overrides = (f"paths.outputs={tmp_path}", "debug=smoke", "method=nearest", "quant.weight=9,8")
    assert sweep(*overrides) == 1
    assert [status.state for status in statuses(tmp_path)] == ["failed", "done"]
    first, said = last_sweep(tmp_path), capsys.readouterr().out
    reason = "quant.weight must be a whole number from 2 to 8, or null (float), got 9"
    assert f"error: {reason}" in said
    assert re.search(rf"failed: {first}/0-\S+: {re.escape(reason)}\n", said)
    made = [hit["computed"] for path in first.rglob("artifacts.json") for hit in json.loads(path.read_text()).values()]
    assert f"2 jobs: 1 done, 1 failed; {sum(made)} of {len(made)} stages computed; 0:0" in said
    assert sum(made) == len([path for path in manifests(tmp_path / "store") if path.parts[-3] != "jobs"])
    assert json.loads((first / "sweep.json").read_text())["jobs"][0]["reason"] == reason
    records = read_records(tmp_path)

    assert sweep(*overrides) == 1
    failed, found = statuses(tmp_path)
    assert (failed.state, found.state) == ("failed", "found")
    assert found.seconds is not None
    assert found.seconds < 3
    assert f"2 jobs: 1 found, 1 failed; 0 of {len(made)} stages computed" in capsys.readouterr().out
    assert found.reason == str(next(first.glob("1-*")))
    assert read_records(tmp_path) == records, "a job that was found counts twice in tables"
    ours, theirs = next(last_sweep(tmp_path).glob("1-*")), next(first.glob("1-*"))
    assert ours != theirs
    for name in ("results.json", "samples.png", "trajectory_error.csv", "environment.json"):
        assert (ours / name).read_bytes() == (theirs / name).read_bytes()
    assert {path.name for path in ours.iterdir()} >= {path.name for path in theirs.iterdir()}


def test_what_is_asked_for_again_is_looked_at_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`force`, a stage that was deleted, and a result that was changed: each time the stages are asked."""
    overrides = ("debug=smoke", "method=nearest", "until=trajectory")

    def state(*more: str) -> str:
        perform(composed(tmp_path, *overrides, *more))
        return read_status(tmp_path / "run").state

    assert state() == "done"
    assert state() == "found"
    assert state("runtime.activation_cache_gib=1") == "found"
    assert state("force=true") == "done"
    next((tmp_path / "store").glob("jobs/*/left.zip")).write_bytes(b"changed")
    assert state() == "done"
    assert state() == "found"
    next((tmp_path / "store").glob("trajectory/*/manifest.json")).unlink()
    assert state() == "done"
    assert json.loads((tmp_path / "run/artifacts.json").read_text())["trajectory"]["computed"]
    capsys.readouterr()
    assert state("until=weights", "dry_run=true") == "planned"
    said = capsys.readouterr().out
    assert re.search(r"trajectory +│ [0-9a-f]{16} │ found +│ +[\d.]+ s", said)
    assert re.search(r"weights +│ [0-9a-f]{16} │ to be made", said)
    assert "images" not in said.split("estimate")[0]


def test_a_dry_run_leaves_the_store_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    attempt(composed(tmp_path, "debug=smoke", "method=nearest", "dry_run=true"), app.work)
    said = capsys.readouterr().out
    assert not (tmp_path / "store").exists()
    assert not list((tmp_path / "run").glob("results*"))
    assert said.count("to be made") == 14  # four of float images made otherwise, and their comparisons
    assert "estimate:" in said


def _run_beside(outputs: Path, store: Path) -> None:
    torch.set_num_threads(1)
    job(outputs, "debug=smoke", "method=nearest", "until=images", f"paths.store={store}")


def test_two_processes_that_need_the_same_stages_make_each_once(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    folders = [tmp_path / "one", tmp_path / "other"]
    children = [context.Process(target=_run_beside, args=(folder, tmp_path / "store")) for folder in folders]
    for child in children:
        child.start()
    for child in children:
        child.join()
        assert child.exitcode == 0
    one, other = (json.loads((folder / "run" / "artifacts.json").read_text()) for folder in folders)
    made = [stage["key"] for stages in (one, other) for stage in stages.values() if stage["computed"]]
    assert len(made) == len(set(made))
    assert set(made) == {path.parent.name for path in manifests(tmp_path / "store")}
    assert {stage["key"] for stage in one.values()} | {stage["key"] for stage in other.values()} == set(made)


def start(outputs: Path, *overrides: str) -> subprocess.Popen[str]:
    """A sweep over four seeds of the program whose second job waits."""
    words = [sys.executable, str(WAITING), "-m", f"paths.outputs={outputs}", "seed=0,1,2,3", *overrides]
    root = os.pathsep.join([str(CONF.parent), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": "1", "COLUMNS": "160"}
    return subprocess.Popen(words, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def when_it_waits(outputs: Path, others: Sequence[str]) -> Status:
    """The status of the job that waits, once the others are done."""
    deadline = time.monotonic() + 100
    while time.monotonic() < deadline:
        time.sleep(0.1)
        try:
            found = {status.name[-1]: status for status in statuses(outputs)}
        except (ValueError, OSError):
            continue
        if found.get("1") and found["1"].state == "running" and all(o in found and found[o].ended for o in others):
            return found["1"]
    raise AssertionError("the sweep did not come so far")


def test_a_killed_worker_is_reported_and_the_same_command_goes_on(tmp_path: Path) -> None:
    process = start(tmp_path, "launcher=joblib")
    os.kill(when_it_waits(tmp_path, "023").pid, signal.SIGKILL)
    said, _ = process.communicate(timeout=100)
    assert process.returncode == 1
    assert "run the same command again" in said
    assert re.search(r"died: \S+/1-\S+: process \d+ on \S+ is gone", said)
    assert "1 died" in said
    assert [status.state for status in statuses(tmp_path)] == ["done", "died", "done", "done"]


def test_a_job_that_is_queued_again_keeps_its_folder_and_ends(tmp_path: Path) -> None:
    process = start(tmp_path, "launcher=submitit_local")
    waiting = when_it_waits(tmp_path, "023")
    os.kill(waiting.pid, signal.SIGUSR2)
    said, _ = process.communicate(timeout=100)
    assert process.returncode == 0, said
    after = statuses(tmp_path)
    assert [status.state for status in after] == ["done"] * 4
    assert after[1].pid != waiting.pid
    attempts = [len((folder / "attempts").read_text().splitlines()) for folder in last_sweep(tmp_path).glob("*-seed*")]
    assert sorted(attempts) == [1, 1, 1, 2]
    assert "4 jobs: 4 done" in said

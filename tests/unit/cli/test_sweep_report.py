"""The state of a job whatever ends it, and the report of a sweep."""

import atexit
import json
import os
import pickle
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from omegaconf import DictConfig, OmegaConf

from tests.unit.cli.test_terminal import record
from tfmq_exp.cli.status import State, begun
from tfmq_exp.cli.sweep_report import SweepReport, job_count, read_jobs, summary


def _job(folder: Path, state: State, number: int, stages: tuple[bool, ...] = (), reason: str = "") -> None:
    (folder / ".hydra").mkdir(parents=True)
    status = begun(folder.name, number)
    (status if state == "running" else status.turned(state, reason)).write(folder)
    hits = {f"stage {i}": {"computed": computed} for i, computed in enumerate(stages)}
    (folder / "artifacts.json").write_text(json.dumps(hits))


def _sweep(
    folder: Path, *overrides: str, sweeper: str = "hydra._internal.core_plugins.basic_sweeper.BasicSweeper"
) -> DictConfig:
    chosen = {"_target_": sweeper, "params": {"seed": "0,1"}}
    return OmegaConf.create(
        {"hydra": {"sweep": {"dir": str(folder)}, "sweeper": chosen, "overrides": {"task": list(overrides)}}}
    )


@pytest.fixture
def report(tmp_path: Path) -> Iterator[SweepReport]:
    made = SweepReport()
    made.on_multirun_start(_sweep(tmp_path))
    yield made
    atexit.unregister(made.cut_short)
    made.handlers.close()


def test_the_report_counts_jobs_and_stages(
    tmp_path: Path, report: SweepReport, capsys: pytest.CaptureFixture[str]
) -> None:
    _job(tmp_path / "10-a", "done", 10, (True, True, False))
    _job(tmp_path / "2-b", "found", 2, (False, False))
    report.on_multirun_end(DictConfig({}))
    assert "2 jobs: 1 done, 1 found; 2 of 5 stages computed; 0:00:00" in capsys.readouterr().out
    _job(tmp_path / "3-c", "failed", 3, reason="no [bold]room[/bold]")
    (tmp_path / "11-d/.hydra").mkdir(parents=True)
    jobs = read_jobs(tmp_path)
    assert [job.folder.name for job in jobs] == ["2-b", "3-c", "10-a", "11-d"]
    assert summary(jobs, 3700.4) == "4 jobs: 1 done, 1 found, 1 failed, 1 died; 2 of 5 stages computed; 1:01:40"
    _job(tmp_path / "12-e", "running", 12)
    report.handlers.close()
    report.on_multirun_start(_sweep(tmp_path))
    with pytest.raises(SystemExit) as stop:
        report.on_multirun_end(DictConfig({}))
    assert stop.value.code == 1
    said = capsys.readouterr().out
    assert f"failed: {tmp_path}/3-c: no [bold]room[/bold]\n" in said
    assert f"died: {tmp_path}/11-d: it ended before it began\n" in said
    assert f"died: {tmp_path}/12-e: process {os.getpid()}" in said
    rows = json.loads((tmp_path / "sweep.json").read_text())["jobs"]
    assert [(row["number"], row["state"]) for row in rows[:2]] == [(2, "found"), (3, "failed")]


def test_a_sweep_ends_with_its_scores_whatever_its_jobs_are_called(
    tmp_path: Path, report: SweepReport, capsys: pytest.CaptureFixture[str]
) -> None:
    for number, (name, seed) in enumerate([("[/]", 0), ("[bold]x", 1), ("\x1b[2J", 2), ("bad", 3)]):
        folder = tmp_path / f"{number}-{name}"
        _job(folder, "done", number)
        rows = [
            record("float", 1.5 + seed).to_json() | {"seed": seed},
            record("tfmq", 2.0 + seed).to_json() | {"seed": seed},
        ]
        (folder / "results.json").write_text(json.dumps({"rows": rows}) if name != "bad" else "{")
    _job(tmp_path / "4-c", "failed", 4, reason="no [/room]")
    _job(tmp_path / "5-found", "found", 5)  # the same results again
    (tmp_path / "5-found/results.json").write_text((tmp_path / "0-[/]/results.json").read_text())
    with pytest.raises(SystemExit):
        report.on_multirun_end(DictConfig({}))
    said = capsys.readouterr().out
    assert "\x1b" not in said
    assert "6 jobs: 4 done, 1 found, 1 failed" in said
    assert "no [/room]" in said
    table = said[said.index("simulated") :]
    assert "2.500 ± 1.000" in table
    assert "3.000 ± 1.000" in table
    assert "| w4a8 | tfmq | 3.000 ± 1.000 |" in (tmp_path / "scores.md").read_text()


def test_a_launcher_that_gives_up_is_followed_by_what_to_do(
    tmp_path: Path, report: SweepReport, capsys: pytest.CaptureFixture[str]
) -> None:
    _job(tmp_path / "0-a", "done", 0)
    report.cut_short()
    said = capsys.readouterr().out
    assert "run the same command again" in said
    assert "1 of 2 jobs never started" in said


@pytest.mark.parametrize(
    ("overrides", "count"),
    [
        ((), 2),
        (("quant=w8a8,w4a8", "until=weights"), 4),
        (("seed=range(0,5)", "a=choice(1,2,3)"), 15),
        (("a=glob(*)",), None),
    ],
)
def test_jobs_of_a_sweep_are_counted_beforehand(tmp_path: Path, overrides: tuple[str, ...], count: int | None) -> None:
    assert job_count(_sweep(tmp_path, *overrides)) == count
    assert job_count(_sweep(tmp_path, *overrides, sweeper="another.Sweeper")) is None


def test_dry_runs_add_up_their_estimates_and_leave_no_folders(
    tmp_path: Path, report: SweepReport, capsys: pytest.CaptureFixture[str]
) -> None:
    for number in range(2):
        _job(tmp_path / f"{number}-a", "planned", number)
        (tmp_path / f"{number}-a/artifacts.json").unlink()
        (tmp_path / f"{number}-a/estimate.json").write_text('{"seconds": 45.0}')
    (tmp_path / "1-a/results.json").write_text("{}")
    report.on_multirun_end(DictConfig({}))
    assert "2 jobs: 2 planned; estimate: 1 min 30 s, " in capsys.readouterr().out
    assert not (tmp_path / "0-a").exists()
    assert (tmp_path / "1-a/results.json").exists(), "it was there before the dry run"


def test_launchers_can_send_it_along(report: SweepReport) -> None:
    assert isinstance(pickle.loads(pickle.dumps(report)), SweepReport)


def test_ctrl_c_is_silent_and_other_errors_are_not(report: SweepReport, capsys: pytest.CaptureFixture[str]) -> None:
    sys.excepthook(KeyboardInterrupt, KeyboardInterrupt(), None)
    assert not capsys.readouterr().err
    sys.excepthook(ValueError, ValueError("told"), None)
    assert "told" in capsys.readouterr().err
    report.handlers.close()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL

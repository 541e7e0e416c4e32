"""The state of a job whatever ends it, and the report of a sweep."""

import atexit
import json
import multiprocessing
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict, read_write
from rich.console import Console

from tests.smoke.jobs import composed
from tfmq_exp.experiment import status as status_module
from tfmq_exp.experiment.outcome import attempt
from tfmq_exp.experiment.status import State, begun, read_status
from tfmq_exp.experiment.sweep import SweepReport, read_jobs, summary


@pytest.fixture
def cfg(tmp_path: Path) -> DictConfig:
    return composed(tmp_path, "method=nearest")


def _as_part_of_a_sweep() -> None:
    hydra = HydraConfig.instance().cfg
    assert hydra is not None
    with read_write(hydra.hydra), open_dict(hydra.hydra):
        hydra.hydra.mode, hydra.hydra.job.num = RunMode.MULTIRUN, 7


def _fail(cfg: DictConfig, folder: Path, console: Console) -> tuple[State, str]:
    assert read_status(folder).state == "running"
    raise ValueError("bits must be\n  2 to 8")


def test_a_single_job_that_fails_ends_the_program_and_one_of_a_sweep_does_not(cfg: DictConfig, tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as stop:
        attempt(cfg, _fail)
    assert stop.value.code == 1
    alone = read_status(tmp_path / "run")
    _as_part_of_a_sweep()
    attempt(cfg, _fail)
    among = read_status(tmp_path / "run")
    assert (alone.state, alone.number, alone.reason) == ("failed", None, "bits must be 2 to 8")
    assert (among.state, among.number, among.reason) == ("failed", 7, "bits must be 2 to 8")
    assert among.seconds is not None
    assert 0 <= among.seconds < 5


def test_a_job_that_a_signal_ends_says_so_and_may_begin_again(cfg: DictConfig, tmp_path: Path) -> None:
    def stop(*_: object) -> tuple[State, str]:
        raise SystemExit(144)

    _as_part_of_a_sweep()
    with pytest.raises(SystemExit) as end:
        attempt(cfg, stop)
    assert end.value.code == 144
    assert read_status(tmp_path / "run").state == "interrupted"
    attempt(cfg, lambda *_: ("done", ""))
    assert read_status(tmp_path / "run").state == "done"


def _hang(cfg: DictConfig) -> None:
    attempt(cfg, lambda *_: time.sleep(60) or ("done", ""))


def test_a_killed_job_has_died_and_its_folder_is_free(
    cfg: DictConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    child = multiprocessing.get_context("fork").Process(target=_hang, args=(cfg,))
    child.start()
    while not (tmp_path / "run/status.json").exists():
        time.sleep(0.01)
    assert read_status(tmp_path / "run").state == "running"
    monkeypatch.setattr(status_module, "PATIENCE", 0.2)
    with pytest.raises(SystemExit):
        attempt(cfg, lambda *_: pytest.fail("two processes in one folder"))
    assert child.pid is not None
    os.kill(child.pid, signal.SIGKILL)
    child.join()
    found = read_status(tmp_path / "run")
    assert found.state == "died"
    assert str(child.pid) in found.reason
    attempt(cfg, lambda *_: ("done", ""))


def _job(folder: Path, state: State, number: int, stages: tuple[bool, ...] = (), reason: str = "") -> None:
    (folder / ".hydra").mkdir(parents=True)
    status = begun(folder.name, number)
    (status if state == "running" else status.turned(state, reason)).write(folder)
    hits = {f"stage {i}": {"computed": computed} for i, computed in enumerate(stages)}
    (folder / "artifacts.json").write_text(json.dumps(hits))


@pytest.fixture
def report(tmp_path: Path) -> Iterator[SweepReport]:
    made = SweepReport()
    made.on_multirun_start(OmegaConf.create({"hydra": {"sweep": {"dir": str(tmp_path)}}}))
    yield made
    atexit.unregister(made.cut_short)


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
    report.on_multirun_start(OmegaConf.create({"hydra": {"sweep": {"dir": str(tmp_path)}}}))
    with pytest.raises(SystemExit) as stop:
        report.on_multirun_end(DictConfig({}))
    assert stop.value.code == 1
    said = capsys.readouterr().out
    assert f"failed: {tmp_path}/3-c: no [bold]room[/bold]\n" in said
    assert f"died: {tmp_path}/11-d: it ended before it began\n" in said
    assert f"died: {tmp_path}/12-e: process {os.getpid()}" in said
    rows = json.loads((tmp_path / "sweep.json").read_text())["jobs"]
    assert [(row["number"], row["state"]) for row in rows[:2]] == [(2, "found"), (3, "failed")]


def test_a_launcher_that_gives_up_is_followed_by_what_to_do(
    tmp_path: Path, report: SweepReport, capsys: pytest.CaptureFixture[str]
) -> None:
    _job(tmp_path / "0-a", "done", 0)
    report.cut_short()
    assert "run the same command again" in capsys.readouterr().out

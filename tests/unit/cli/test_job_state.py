"""The state of a job whatever ends it."""

import errno
import multiprocessing
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, open_dict, read_write
from rich.console import Console

from tests.e2e.jobs import composed
from tfmq_exp.cli import status as status_module
from tfmq_exp.cli.job import attempt, what_stopped
from tfmq_exp.cli.status import State, read_status


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


@pytest.mark.parametrize(("number", "told"), [(signal.SIGTERM, "SIGTERM"), (signal.SIGINT, "Ctrl-C (SIGINT)")])
def test_signals_are_told_by_name(
    cfg: DictConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str], number: signal.Signals, told: str
) -> None:
    def work(*_: object) -> tuple[State, str]:
        os.kill(os.getpid(), number)
        time.sleep(60)
        return "done", ""

    with pytest.raises(SystemExit) as end:
        attempt(cfg, work)
    assert end.value.code == 128 + number
    found = read_status(tmp_path / "run")
    assert (found.state, found.reason) == ("interrupted", f"stopped by {told}")
    assert f"stopped by {told}; the same command goes on" in capsys.readouterr().out
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_what_a_library_makes_of_a_signal_is_understood() -> None:
    class SIGTERMException(SystemExit):
        """Named as Lightning's."""

    wrapped = SystemExit(1)
    wrapped.__context__ = KeyboardInterrupt()
    assert what_stopped(wrapped) == "Ctrl-C (SIGINT)"
    assert what_stopped(SIGTERMException()) == "SIGTERM"
    assert what_stopped(SystemExit(144)) == "SystemExit"


def test_ctrl_c_that_a_library_turned_into_an_exit_is_ctrl_c(cfg: DictConfig, tmp_path: Path) -> None:
    def learn(*_: object) -> Any:
        try:
            raise KeyboardInterrupt
        except KeyboardInterrupt:  # as Lightning does
            sys.exit(1)

    with pytest.raises(SystemExit) as end:
        attempt(cfg, learn)
    assert end.value.code == 130
    assert read_status(tmp_path / "run").state == "interrupted"


@pytest.mark.parametrize("reason", ["no room", "long " * 2000, "\u20ac" * 5000])
def test_a_job_on_a_full_disk_has_failed(
    cfg: DictConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reason: str
) -> None:
    """Not a block is left: the status goes where the first one was."""

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    def work(*_: object) -> Any:
        monkeypatch.setattr(status_module, "write_atomically", full)
        raise ValueError(reason)

    with pytest.raises(SystemExit):
        attempt(cfg, work)
    found = read_status(tmp_path / "run")
    assert found.state == "failed"
    assert found.reason[:100] == reason.strip()[:100]
    assert (tmp_path / "run/status.json").stat().st_size == status_module.RESERVED


def test_an_error_says_where_its_traceback_is(
    cfg: DictConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        attempt(cfg, _fail)
    assert f"its traceback is in {tmp_path}/run/run.log\n" in capsys.readouterr().out


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
    monkeypatch.setattr(status_module, "LOCK_TIMEOUT", 0.2)
    with pytest.raises(SystemExit):
        attempt(cfg, lambda *_: pytest.fail("two processes in one folder"))
    assert child.pid is not None
    os.kill(child.pid, signal.SIGKILL)
    child.join()
    found = read_status(tmp_path / "run")
    assert found.state == "died"
    assert str(child.pid) in found.reason
    attempt(cfg, lambda *_: ("done", ""))

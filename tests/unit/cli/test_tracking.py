"""What a run tells a mirror, mirrors that forward, and choices that cannot be."""

import sys
from pathlib import Path
from typing import Any

import pytest
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import OmegaConf

from tests.e2e.jobs import composed
from tfmq_exp.cli.job_cache import dashboards
from tfmq_exp.cli.log_outputs import points, run_card, show_losses, stage_summary, sweep_name
from tfmq_exp.loggers.base import Logger, NoLogger, NullLogger, RunMetadata
from tfmq_exp.loggers.collection import LoggerCollection, LoggersConfig
from tfmq_exp.loggers.tensorboard import TensorBoard
from tfmq_exp.loggers.wandb import Wandb, identity, not_followed


class Heard(NullLogger):
    """Notes what it is told."""

    def __init__(self) -> None:
        self.told: list[tuple[Any, ...]] = []

    def loss(self, unit: str, iteration: int, value: float) -> None:
        self.told.append(("loss", unit, iteration, value))

    def close(self, *, failed: bool) -> None:
        self.told.append(("close", failed))

    def where(self) -> list[str]:
        return [f"told {len(self.told)} times"]


class Opened:
    """A choice whose mirror is known; without one it fails to open."""

    def __init__(self, mirror: Logger | None) -> None:
        self.mirror = mirror

    def open(self, run: RunMetadata) -> Logger:
        if self.mirror is None:
            raise OSError("cannot be opened")
        return self.mirror


def card(folder: Path) -> RunMetadata:
    return RunMetadata(folder, "name", None, "tfmq", ("digits", "w4a8"), {"quant": "w4a8"}, {"seed": 3})


@pytest.mark.parametrize(
    ("folder", "name"),
    [
        ("outputs/sweeps/2026-11-20/234000/0-a", "2026-11-20-234000"),
        ("outputs/sweeps/bits/0-a", "bits"),
        ("elsewhere/mine/0-a", "mine"),
    ],
)
def test_runs_of_a_sweep_share_the_name_of_its_folder(tmp_path: Path, folder: str, name: str) -> None:
    assert sweep_name(tmp_path / folder, tmp_path / "outputs") == name


def test_a_card_says_what_was_chosen(tmp_path: Path) -> None:
    run = tmp_path / "sweeps/bits/0"
    alone = run_card(composed(tmp_path, "method=brecq", "method/scales=finite_set", "quant=w3a8"), run, {"git": "abc"})
    assert (alone.name, alone.group, alone.kind, alone.tags) == ("0", None, "brecq", ("digits", "w3a8"))
    expected = {"model": "digits", "quant": "w3a8", "method": "brecq", "sampler": "ddim", "method/scales": "finite_set"}
    assert expected.items() <= alone.choices.items()
    assert not any(group.startswith("hydra/") for group in alone.choices)
    assert alone.settings["quant"]["weight"] == 3
    assert alone.settings["environment"] == {"git": "abc"}
    assert run_card(composed(tmp_path, "hydra.mode=MULTIRUN"), run, {}).group == "bits"


def test_curves_that_grew_before_the_eyes_are_not_shown_again() -> None:
    rows = [{"phase": "weights", "unit": unit, "iteration": i, "loss": i / 4} for unit in "ab" for i in (1, 2)]
    mirror = Heard()
    show_losses(mirror, rows, {"weights/a", "activations/b"})
    assert mirror.told == [("loss", "weights/b", 1, 0.25), ("loss", "weights/b", 2, 0.5)]


def test_points_have_places_and_numbers_alone() -> None:
    rows = [{"step": 0, "t": 751, "k": 0.5, "bits": None}, {"step": 1, "t": 1, "k": 0.25, "bits": 4}]
    assert points(rows, "t") == [(751, {"k": 0.5}), (1, {"k": 0.25, "bits": 4})]
    assert [place for place, _ in points(rows, "step")] == [0, 1]


def test_a_stage_is_summed_up_under_its_name() -> None:
    hit = {"key": "0", "computed": True, "seconds": 2.0, "took": 2.5, "peak_mib": 100, "path": "x"}
    said = stage_summary("float images", hit)
    assert said["stages/float_images/seconds"] == 2.0
    assert said["stages/float_images/peak_mib"] == 100
    assert "stages/float_images/path" not in said


def test_several_mirrors_are_told_the_same_and_all_closed(tmp_path: Path) -> None:
    one, other = Heard(), Heard()
    both = LoggersConfig(one=Opened(one), other=Opened(other), files=NoLogger()).open(card(tmp_path))
    both.loss("weights/a", 1, 0.5)

    class Stuck(NullLogger):
        def close(self, *, failed: bool) -> None:
            raise OSError("stuck")

    with pytest.raises(OSError, match="stuck"):
        LoggerCollection([Stuck(), both, Stuck()]).close(failed=True)
    assert one.told == other.told == [("loss", "weights/a", 1, 0.5), ("close", True)]
    assert both.where() == ["told 2 times"] * 2


def test_a_mirror_is_closed_when_the_next_cannot_be_opened(tmp_path: Path) -> None:
    mirror = Heard()
    with pytest.raises(OSError, match="cannot be opened"):
        LoggersConfig(one=Opened(mirror), other=Opened(None)).open(card(tmp_path))
    assert mirror.told == [("close", True)]


def test_a_run_keeps_its_identity(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    assert identity(tmp_path / "a") == identity(tmp_path / "a") != identity(tmp_path / "b")


def test_online_without_an_account_is_an_error_not_a_question(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("it asked"))
    with pytest.raises(RuntimeError, match="wandb login"):
        Wandb("project", "online").open(card(tmp_path))
    with pytest.raises(ValueError, match="'sometimes'"):
        Wandb("project", "sometimes")


def test_without_tensorboard_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(RuntimeError, match=r"'\.\[tensorboard\]'"):
        TensorBoard().open(card(tmp_path))


@pytest.mark.parametrize(
    ("environment", "mode", "switch"),
    [
        ({"WANDB_DISABLED": "true"}, "online", "WANDB_DISABLED"),
        ({"WANDB_DISABLED": "1", "WANDB_MODE": "online"}, "online", "WANDB_DISABLED"),
        ({"WANDB_MODE": "disabled"}, "disabled", "WANDB_MODE"),
        ({}, "disabled", "logger.mode"),
    ],
)
def test_weights_and_biases_can_be_switched_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], mode: str, switch: str
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    mirror = Wandb("project", mode=mode).open(card(tmp_path))
    mirror.loss("weights/a", 1, 2.0)
    mirror.close(failed=False)
    assert mirror.where() == [f"Weights & Biases: nothing written, {switch} switches it off"]
    assert not list(tmp_path.iterdir())


def test_the_environment_of_weights_and_biases_counts_below_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("WANDB_MODE", "WANDB_PROJECT", "WANDB_ENTITY", "WANDB_RUN_GROUP"):
        monkeypatch.delenv(name, raising=False)
    assert instantiate(composed(tmp_path, "logger=wandb").logger) == Wandb("tfmq_exp")
    for name, value in (("MODE", "disabled"), ("PROJECT", "p"), ("ENTITY", "e"), ("RUN_GROUP", "g")):
        monkeypatch.setenv(f"WANDB_{name}", value)
    assert instantiate(composed(tmp_path, "logger=wandb").logger) == Wandb("p", "disabled", "e", "g")
    told = instantiate(composed(tmp_path, "logger=wandb", "logger.mode=offline", "logger.project=own").logger)
    assert told == Wandb("own", "offline", "e", "g")
    assert not_followed("offline") == ["logger.mode=offline stands above WANDB_MODE=disabled"]
    monkeypatch.setenv("WANDB_MODE", "dryrun")  # as it was called once
    monkeypatch.setenv("WANDB_RUN_ID", "mine")
    assert instantiate(composed(tmp_path, "logger=wandb").logger).chosen == "offline"
    assert not_followed("offline") == ["not followed: WANDB_RUN_ID; a run goes on under the id in its folder"]
    monkeypatch.setenv("WANDB_MODE", "ofline")
    with pytest.raises(InstantiationException, match="got 'ofline', from WANDB_MODE"):
        instantiate(composed(tmp_path, "logger=wandb").logger)


def test_a_disabled_dashboard_is_none(tmp_path: Path) -> None:
    """A job that was finished without one is done again where one is asked for."""
    loggers = {
        word: composed(tmp_path, "logger=wandb", f"logger.mode={word}").logger for word in ("offline", "disabled")
    }
    assert list(dashboards(loggers["disabled"])) == []
    assert list(dashboards(loggers["offline"])) == ["tfmq_exp.loggers.wandb.Wandb"]
    both = composed(tmp_path, "logger=many", "logger.wandb.mode=disabled").logger
    assert "tfmq_exp.loggers.wandb.Wandb" not in list(dashboards(OmegaConf.to_container(both)))


def test_a_run_of_weights_and_biases_takes_folder_name_and_tags_from_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import wandb

    started: dict[str, Any] = {}

    class Run:
        dir, offline = str(tmp_path / "elsewhere/wandb/offline-run-1/files"), True

        def define_metric(self, *_: object, **__: object) -> None:
            """As wandb's."""

    monkeypatch.setattr(wandb, "init", lambda **given: started.update(given) or Run())
    for name, value in (("DIR", str(tmp_path / "elsewhere")), ("NAME", "mine"), ("TAGS", "a,b"), ("MODE", "online")):
        monkeypatch.setenv(f"WANDB_{name}", value)
    mirror = Wandb("project").open(card(tmp_path))
    assert (started["dir"], started["name"]) == (str(tmp_path / "elsewhere"), "mine")
    assert started["tags"] == ("digits", "w4a8", "a", "b")
    assert mirror.where() == [
        f"Weights & Biases, offline: upload it with: wandb sync {tmp_path}/elsewhere/wandb/offline-run-1",
        "Weights & Biases: logger.mode=offline stands above WANDB_MODE=online",
    ]

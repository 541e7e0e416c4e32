"""Weights & Biases: settings, and what the environment may say."""

from pathlib import Path
from typing import Any

import pytest
from hydra.errors import InstantiationException
from hydra.utils import instantiate

from tests.e2e.jobs import composed
from tests.helpers.loggers import metadata
from tfmq_exp.loggers.wandb import Wandb, ignored_variables, run_id


def test_a_run_keeps_its_id(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    assert run_id(tmp_path / "a") == run_id(tmp_path / "a") != run_id(tmp_path / "b")


def test_online_without_an_account_is_an_error_not_a_question(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("it asked"))
    with pytest.raises(RuntimeError, match="wandb login"):
        Wandb("project", "online").open(metadata(tmp_path))
    with pytest.raises(ValueError, match="'sometimes'"):
        Wandb("project", "sometimes")


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
    logger = Wandb("project", mode=mode).open(metadata(tmp_path))
    logger.log_loss("weights/a", 1, 2.0)
    logger.close(failed=False)
    assert logger.locations() == [f"Weights & Biases: nothing written, {switch} switches it off"]
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
    chosen = instantiate(composed(tmp_path, "logger=wandb", "logger.mode=offline", "logger.project=own").logger)
    assert chosen == Wandb("own", "offline", "e", "g")
    assert ignored_variables("offline") == ["logger.mode=offline overrides WANDB_MODE=disabled"]
    monkeypatch.setenv("WANDB_MODE", "dryrun")  # as it was called once
    monkeypatch.setenv("WANDB_RUN_ID", "mine")
    assert instantiate(composed(tmp_path, "logger=wandb").logger).current_mode == "offline"
    assert ignored_variables("offline") == ["not followed: WANDB_RUN_ID; a run goes on under the id in its folder"]
    monkeypatch.setenv("WANDB_MODE", "ofline")
    with pytest.raises(InstantiationException, match="got 'ofline', from WANDB_MODE"):
        instantiate(composed(tmp_path, "logger=wandb").logger)


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
    logger = Wandb("project").open(metadata(tmp_path))
    assert (started["dir"], started["name"]) == (str(tmp_path / "elsewhere"), "mine")
    assert started["tags"] == ("digits", "w4a8", "a", "b")
    assert logger.locations() == [
        f"Weights & Biases, offline: upload it with: wandb sync {tmp_path}/elsewhere/wandb/offline-run-1",
        "Weights & Biases: logger.mode=offline overrides WANDB_MODE=online",
    ]

"""What a run logs."""

from dataclasses import replace
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from tests.e2e.jobs import composed
from tests.helpers.loggers import RecordingLogger
from tfmq_exp.cli.finished_jobs import dashboards
from tfmq_exp.cli.outputs.run_folder import log_losses, points, run_metadata, sweep_name
from tfmq_exp.cli.run_info import current_run
from tfmq_exp.pipeline.pipeline import stage_summary


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
    cfg = composed(tmp_path, "method=brecq", "method/scales=finite_set", "quant=w3a8")
    alone = run_metadata(cfg, replace(current_run(), folder=run), {"git": "abc"})
    assert (alone.name, alone.group, alone.kind, alone.tags) == ("0", None, "brecq", ("digits", "w3a8"))
    expected = {"model": "digits", "quant": "w3a8", "method": "brecq", "sampler": "ddim", "method/scales": "finite_set"}
    assert expected.items() <= alone.choices.items()
    assert not any(group.startswith("hydra/") for group in alone.choices)
    assert alone.settings["quant"]["weight"] == 3
    assert alone.settings["environment"] == {"git": "abc"}
    cfg = composed(tmp_path, "hydra.mode=MULTIRUN")
    assert run_metadata(cfg, replace(current_run(), folder=run), {}).group == "bits"


def test_curves_that_grew_before_the_eyes_are_not_shown_again() -> None:
    rows = [{"phase": "weights", "unit": unit, "iteration": i, "loss": i / 4} for unit in "ab" for i in (1, 2)]
    logger = RecordingLogger()
    log_losses(logger, rows, {"weights/a", "activations/b"})
    assert logger.calls == [("loss", "weights/b", 1, 0.25), ("loss", "weights/b", 2, 0.5)]


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


def test_a_disabled_dashboard_is_none(tmp_path: Path) -> None:
    """A job that was finished without one is done again where one is asked for."""
    loggers = {
        word: composed(tmp_path, "logger=wandb", f"logger.mode={word}").logger for word in ("offline", "disabled")
    }
    assert list(dashboards(loggers["disabled"])) == []
    assert list(dashboards(loggers["offline"])) == ["tfmq_exp.loggers.wandb.Wandb"]
    both = composed(tmp_path, "logger=many", "logger.wandb.mode=disabled").logger
    assert "tfmq_exp.loggers.wandb.Wandb" not in list(dashboards(OmegaConf.to_container(both)))

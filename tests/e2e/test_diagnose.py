"""Diagnoses of finished runs: files, figures, and what the store keeps of them."""

import csv
import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

from tests.e2e.jobs import composed, job
from tests.helpers.pipelines import GOLDENS
from tfmq_exp.cli import main as app
from tfmq_exp.cli.finished_jobs import is_written
from tfmq_exp.cli.terminal import ProgressBars
from tfmq_exp.core.files import write_checked, write_json
from tfmq_exp.pipeline.experiment import Experiment
from tfmq_exp.report.figures import short_name

TABLES = {
    "weight_rounding": ("layer", "changed", "largest_steps", "mse_ratio"),
    "temporal_features": ("layer", "step", "t", "cosine_distance", "relative_mse"),
    "temporal_features_by_layer": ("layer", "relative_mse", "at_t"),
    "error_accumulation": ("step", "t", "eps_error", "own_eps_error", "x_error"),
    "block_similarity": ("block", "kind", "step", "t", "cka", "cosine"),
    "activation_ranges": ("activation", "call", "t", "min", "q01", "q99", "max", "interval", "clipped"),
    "activation_changes": ("activation", "width_change", "correlation", "same_as"),
    "unit_sensitivity": ("unit", "relative_error", "first_third", "last_third", "share"),
}
FIGURES = {
    "weight_rounding",
    "temporal_features",
    "error_accumulation",
    "block_cka",
    "block_cosine",
    "activation_ranges",
    "activation_changes",
    "unit_sensitivity",
}
SMALL = ("until=diagnose", "debug=smoke", "method=nearest", "diagnosis.trajectories=3", "diagnosis.samples=6")

pytestmark = pytest.mark.filterwarnings("ignore::Warning:pytorch_lightning")


def read(folder: Path, table: str) -> list[dict[str, str]]:
    with (folder / "diagnosis" / f"{table}.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def mean(blocks: list[dict[str, str]], name: str) -> float:
    return float(np.mean([float(row["cka"]) for row in blocks if row["block"] == name]))


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return job(tmp_path_factory.mktemp("diagnosed"), *SMALL)


def test_tables_and_figures_are_there(first: Path) -> None:
    for name, columns in TABLES.items():
        rows = read(first, name)
        assert rows, name
        assert set(columns) <= rows[0].keys(), name
    assert {path.stem for path in (first / "diagnosis").glob("*.png")} == FIGURES
    for name in FIGURES:
        pixels = np.asarray(Image.open(first / "diagnosis" / f"{name}.png").convert("L"))
        assert 0.01 < (pixels < 250).mean() < 0.95, name
    assert not (first / "samples.png").exists()


def test_what_it_says_of_rounding_to_nearest(first: Path) -> None:
    assert {row["changed"] for row in read(first, "weight_rounding")} == {"0.0"}
    calls = {row["call"] for row in read(first, "activation_ranges")}
    assert len(read(first, "activation_ranges")) == len(calls) * 63  # the first layer's input is float
    blocks = read(first, "block_similarity")
    assert all(0.5 < float(row[key]) < 1.00001 for row in blocks for key in ("cka", "cosine"))
    least = min({row["block"] for row in blocks}, key=lambda name: mean(blocks, name))
    with Image.open(first / "diagnosis/block_cka.png") as image:
        assert (
            f"these blocks are least similar: {short_name(least)} ({mean(blocks, least):.4g}, "
            in image.info["Description"]
        )
    units = read(first, "unit_sensitivity")
    assert units[0]["unit"] == "temporal_information_block"
    assert all(float(row["relative_error"]) > 0 for row in units)


def experiment(first: Path, tmp_path: Path, *overrides: str) -> Experiment:
    """Of the same run, or nearly, with what the store has of it."""
    cfg = composed(tmp_path, *SMALL, *overrides, f"paths.store={first.parent / 'store'}")
    return app.make_experiment(cfg, torch.device("cpu"), ProgressBars(Console(quiet=True)).stage)


def test_other_jobs_find_all_that_a_diagnosis_writes(first: Path) -> None:
    left = [path.relative_to(first).as_posix() for path in first.glob("diagnosis/*")]
    assert left
    assert all(map(is_written, left))


def computed(found: Experiment) -> set[str]:
    return {name for name, record in found.pipeline.stage_log.items() if record["computed"]}


def test_the_rest_of_a_killed_diagnosis_is_done(first: Path, tmp_path: Path) -> None:
    """A finished unit is not asked again, and the rows come out the same."""
    (entry,) = (path for path in (first.parent / "store/diagnosis_sensitivity").iterdir() if path.is_dir())
    before = {row["unit"]: row for row in json.loads((entry / "rows.json").read_text())}
    for name in ("manifest.json", "rows.json", "units/conv_in.json"):
        (entry / name).unlink()
    for kept in (entry / "units").iterdir():
        content = json.loads(kept.read_text())
        changed = {**content, "relative_error": 0.125} if kept.stem == "conv_out" else content
        write_checked(kept, partial(write_json, data=changed))
    found = experiment(first, tmp_path)
    assert [stage.name for stage in found.diagnoses.values() if not stage.entry.done] == ["sensitivity"]
    assert found.diagnoses["sensitivity"].count() == 3 * 6  # one unit, the whole network and the float one
    after = {row["unit"]: row for row in found.diagnoses["sensitivity"].rows()}
    assert computed(found) == {"sensitivity"}
    assert found.diagnoses["sensitivity"].entry.done
    assert after.pop("conv_out")["relative_error"] == 0.125 != before.pop("conv_out")["relative_error"]
    assert after == before


def test_all_but_one_unit(first: Path, tmp_path: Path) -> None:
    """Another entry of the store; leaving the worst unit float removes much of the error, and never all of it."""
    found = experiment(first, tmp_path, "diagnosis.sensitivity=others")
    rows = found.diagnoses["sensitivity"].rows()
    assert computed(found) == {"sensitivity"}
    assert 0.05 < max(row["share"] for row in rows) < 1


def test_attention_to_words(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A transformer with text: words are compared, and one that is in no caption is an error before anything is computed."""
    texts = tmp_path / "captions.txt"
    texts.write_text("a red cat\nphoto of the $sea$\n")
    call = [f"+model.call.{key}={value}" for key, value in {"height": 16, "width": 16}.items()]
    options = ("method=nearest", "diagnosis.words=[cat,sea]", "protocol.sampling.num_inference_steps=4", *call)
    tiny = (
        f"path={GOLDENS / 'pixart'}",
        "model=pipeline",
        f"captions={texts}",
        "+model.call.use_resolution_binning=false",
        "+model.call.clean_caption=false",
    )
    with pytest.raises(SystemExit):
        job(tmp_path / "wrong", *SMALL, *tiny, *options, "diagnosis.words=[dog]")
    assert "diagnosis.words: 'dog' is in none of the 3 captions" in " ".join(capsys.readouterr().out.split())
    assert not (tmp_path / "wrong/store").exists()
    folder = job(tmp_path, *SMALL, *tiny, *options)
    rows = read(folder, "attention_maps")
    assert [row["word"] for row in rows] == ["cat"] * 3 + ["sea"] * 3
    assert {row["images"] for row in rows if row["word"] == "cat"} == {"2"}  # the first and the third of three
    with Image.open(folder / "diagnosis/attention_maps.png") as image:
        assert "cat of “a red cat”; sea of “photo of the $sea$”." in image.info["Description"]


def test_a_wrong_plan_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        job(tmp_path, *SMALL, "diagnosis.sensitivity=none")
    assert "diagnosis.sensitivity must be one of alone, others, got 'none'" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        job(tmp_path, *SMALL, "diagnosis.words=[7]")
    assert "diagnosis.words must be a list, each a word, got [7]" in capsys.readouterr().out

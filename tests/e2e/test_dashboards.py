"""Mirrors of real runs, read back from their own files: what a dashboard shows is what the run folder says."""

import json
import multiprocessing
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from wandb.env import SERVICE

from tests.e2e.jobs import CONF, job
from tests.helpers.dashboards import Logged, loss_curves, offline_folders, rows_of, with_slashes
from tfmq_exp.pipeline.unit_checkpoints import FileUnitCheckpointer

METHOD = ("debug=smoke", "method=brecq", "protocol.reconstruction.iterations=26")  # two points in a curve of weights
SWEEP = ("hydra.mode=MULTIRUN", "hydra.job.num=0")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One job of a sweep with both mirrors; looking up a host's name would be an error."""
    folder = tmp_path_factory.mktemp("dashboards")
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("WANDB_API_KEY", raising=False)
        looked_up: list[Any] = []
        patch.setattr(socket, "getaddrinfo", lambda *host, **_: looked_up.append(host) or [])
        job(folder, *METHOD, *SWEEP, "logger=many")
    assert not looked_up
    return folder / "run"


@pytest.fixture(scope="module")
def shown(run: Path) -> Logged:
    (only,) = offline_folders(run)
    return only


@pytest.fixture(scope="module")
def events(run: Path) -> EventAccumulator:
    return EventAccumulator(str(run / "tensorboard"), {"tensors": 0, "scalars": 0, "images": 0}).Reload()


def test_wandb_knows_the_run_by_its_choices(run: Path, shown: Logged) -> None:
    assert shown.run.run_id == (run / "wandb.id").read_text()
    assert (shown.run.project, shown.run.run_group) == ("tfmq_exp", run.parent.name)
    assert (shown.run.job_type, list(shown.run.tags)) == ("brecq", ["digits", "w4a8"])
    choices = shown.config["choices"]
    assert [choices[key] for key in ("model", "quant", "method", "sampler")] == ["digits", "w4a8", "brecq", "ddim"]
    assert choices["method/weights/partition"] == "blockwise"
    assert shown.config["protocol"]["reconstruction"]["iterations"] == 26
    assert shown.config["environment"] == json.loads((run / "environment.json").read_text())
    assert shown.exit_code == 0


def test_wandb_draws_losses_against_their_own_iterations(run: Path, shown: Logged) -> None:
    wanted = loss_curves(run)
    assert {unit.split("/")[0] for unit in wanted} == {"weights", "activations"}
    units = {(row["phase"], row["unit"]) for row in rows_of(run / "units.csv")}
    assert {tuple(unit.split("/")) for unit in wanted} == units
    assert [i for i, _ in wanted["weights/mid_block.resnets.0"]] == [25, 26]
    assert shown.curves("loss/", "iteration") == with_slashes(wanted)
    assert shown.steps["loss/*"] == "iteration"
    assert not [key for key in shown.summary if key.startswith("loss/")], "a pattern has missed a curve"


@pytest.mark.parametrize(("name", "axis", "column"), [("temporal", "timestep", "t"), ("trajectory", "step", "step")])
def test_wandb_draws_errors_along_the_sampling(run: Path, shown: Logged, name: str, axis: str, column: str) -> None:
    rows = rows_of(run / f"{name}_error.csv")
    assert len(rows) == 4
    wanted = {key: [(int(row[column]), float(row[key])) for row in rows] for key in rows[0].keys() - {"step", "t"}}
    assert shown.curves(f"{name}_error/", axis) == wanted
    assert shown.steps[f"{name}_error/*"] == axis


def test_wandb_sums_up_what_the_results_say(run: Path, shown: Logged) -> None:
    original, quantized = json.loads((run / "results.json").read_text())["rows"]
    for prefix, wanted in (
        ("scores", quantized["scores"]),
        ("float_scores", original["scores"]),
        ("errors", quantized["errors"]),
    ):
        found = {key: value for key, value in shown.summary.items() if key.startswith(f"{prefix}/")}
        assert found == {f"{prefix}/{key}": value for key, value in wanted.items()}
    for name, hit in quantized["cost"]["stages"].items():
        for what in ("seconds", "peak_mib", "computed"):
            assert shown.summary[f"stages/{name.replace(' ', '_')}/{what}"] == hit[what]
    assert shown.summary["cost/weights_bytes"] == quantized["weights_bytes"]


def test_wandb_has_pictures_and_tables(run: Path, shown: Logged) -> None:
    for name in ("samples", "temporal_error", "trajectory_error"):
        path = next(row[f"images/{name}"]["path"] for row in shown.history if f"images/{name}" in row)
        assert (shown.folder / "files" / path).read_bytes() == (run / f"{name}.png").read_bytes()
    for name in ("units", "temporal_error", "trajectory_error"):
        table, wanted = shown.table(name), rows_of(run / f"{name}.csv")
        assert table["columns"] == list(wanted[0])
        assert [[str(value) for value in row] for row in table["data"]] == [list(row.values()) for row in wanted]


def test_tensorboard_shows_the_same(run: Path, events: EventAccumulator) -> None:
    def scalars(tag: str) -> list[tuple[int, float]]:
        return [(event.step, event.value) for event in events.Scalars(tag)]

    def single(points: list[tuple[int, float]]) -> list[tuple[int, float]]:
        return [(i, torch.tensor(value, dtype=torch.float32).item()) for i, value in points]

    wanted = loss_curves(run)
    tags = {tag for tag in events.Tags()["scalars"] if tag.startswith("loss/")}
    assert tags == {f"loss/{unit}" for unit in wanted}
    for unit, points in wanted.items():
        assert scalars(f"loss/{unit}") == single(points)
    rows = rows_of(run / "temporal_error.csv")
    assert scalars("temporal_error/cosine") == single([(int(row["t"]), float(row["cosine"])) for row in rows])
    fid = json.loads((run / "results.json").read_text())["rows"][1]["scores"]["fid"]
    assert scalars("scores/fid")[0] == single([(0, fid)])[0]
    images = {f"images/{name}" for name in ("samples", "temporal_error", "trajectory_error")}
    assert set(events.Tags()["images"]) == images
    texts = set(events.Tags()["tensors"])
    assert {"config/text_summary", "tables/units/text_summary", "status/text_summary"} <= texts
    assert events.Tensors("status/text_summary")[0].tensor_proto.string_val == [b"finished"]


def test_tensorboard_can_compare_runs_by_their_choices(run: Path, events: EventAccumulator) -> None:
    from tensorboard.plugins.hparams import plugin_data_pb2

    start = events.summary_metadata["_hparams_/session_start_info"].plugin_data.content
    given = plugin_data_pb2.HParamsPluginData.FromString(start).session_start_info.hparams
    assert {key: given[key].string_value for key in ("quant", "method")} == {"quant": "w4a8", "method": "brecq"}


def test_the_report_speaks_of_what_runs_log(shown: Logged, tmp_path: Path) -> None:
    command = [sys.executable, "scripts/wandb_report.py", "--group", "bits", "--offline", str(tmp_path)]
    subprocess.run(command, cwd=CONF.parent, check=True)
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["group"] == "bits"
    logged = {key for row in shown.history for key in row}
    panels = [panel for section in report["sections"] for panel in section["panels"]]
    for section in report["sections"]:
        assert set(section["columns"]) <= shown.summary.keys()
        assert all(shown.config[group][name] for group, name in (key.split(".") for key in section["group_by"]))
    for panel in panels:
        match panel["kind"]:
            case "curve":
                assert {panel["x"], panel["y"]} <= logged
            case "curves":
                assert [key for key in logged if re.fullmatch(panel["pattern"], key)]
            case "scatter":
                assert panel["y"] in shown.summary
                assert panel["x"] in shown.summary or shown.config["quant"][panel["x"].removeprefix("quant.")]
            case "bars":
                assert set(panel["metrics"]) <= shown.summary.keys()
            case "table":
                assert panel["table"] in logged
            case "images":
                assert set(panel["images"]) <= logged
            case other:
                pytest.fail(f"unknown panel {other}")
    assert len(panels) >= 9


def die_after_units(folder: Path, units: int, *overrides: str) -> None:
    """In a process of its own: SIGKILL when so many units are kept."""
    torch.set_num_threads(1)
    os.environ.pop(SERVICE, None)  # wandb's own process is this job's, and goes with it
    put, kept = FileUnitCheckpointer.put, iter(range(1, units + 1))

    def put_and_die(files: FileUnitCheckpointer, *what: Any) -> None:
        put(files, *what)
        if next(kept) == units:
            os.kill(os.getpid(), signal.SIGKILL)

    FileUnitCheckpointer.put = put_and_die  # type: ignore[method-assign]
    job(folder, *overrides)


def test_a_killed_and_resumed_run_is_one_run_with_all_its_curves(run: Path, tmp_path: Path) -> None:
    overrides = (*METHOD, "until=weights", "logger=many")
    shutil.copytree(run.parent / "store/trajectory", tmp_path / "store/trajectory")
    child = multiprocessing.get_context("fork").Process(target=die_after_units, args=(tmp_path, 3, *overrides))
    child.start()
    child.join()
    assert child.exitcode == -signal.SIGKILL
    resumed = job(tmp_path, *overrides)
    first, second = offline_folders(resumed)
    assert first.folder.name.rpartition("-")[2] == second.run.run_id == (resumed / "wandb.id").read_text()
    assert (first.exit_code, second.exit_code) == (None, 0)
    wanted = {unit: points for unit, points in loss_curves(run).items() if unit.startswith("weights/")}
    assert loss_curves(resumed) == wanted, "three units were kept, the others learned after the kill"
    assert second.curves("loss/", "iteration") == with_slashes(wanted)
    tags = EventAccumulator(str(resumed / "tensorboard")).Reload().Tags()["scalars"]
    assert {tag for tag in tags if tag.startswith("loss/")} == {f"loss/{unit}" for unit in wanted}


def test_a_run_that_finds_everything_in_the_store_shows_the_same_curves(run: Path, tmp_path: Path) -> None:
    again = job(tmp_path, *METHOD, f"paths.store={run.parent / 'store'}", "logger=wandb")
    assert not any(hit["computed"] for hit in json.loads((again / "artifacts.json").read_text()).values())
    assert (again / "losses.csv").read_bytes() == (run / "losses.csv").read_bytes()
    (shown,) = offline_folders(again)
    assert shown.curves("loss/", "iteration") == with_slashes(loss_curves(run))
    assert shown.run.run_id != (run / "wandb.id").read_text()
    assert shown.run.run_group == ""


def test_a_failed_run_is_marked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        job(tmp_path, "debug=smoke", "logger=many", "model.denoiser.path=/nowhere.safetensors")
    (shown,) = offline_folders(tmp_path / "run")
    assert shown.exit_code == 1
    events = EventAccumulator(str(tmp_path / "run/tensorboard")).Reload()
    assert events.Tensors("status/text_summary")[0].tensor_proto.string_val == [b"failed"]
    assert "/nowhere.safetensors" in capsys.readouterr().out

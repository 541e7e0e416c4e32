"""Whole jobs, from configuration to tables, at the smoke size."""

import csv
import hashlib
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.e2e.jobs import CONF, job
from tfmq_exp.cli.finished_jobs import is_written
from tfmq_exp.report.records import read_records
from tfmq_exp.report.tables import table
from tfmq_exp.sampling.images import to_uint8
from tfmq_exp.surgery import serialization

FILES = (
    "results.json",
    "artifacts.json",
    "environment.json",
    "config.yaml",
    "quantized.json",
    "units.csv",
    "samples.png",
    "temporal_error.csv",
    "temporal_error.png",
    "trajectory_error.csv",
    "trajectory_error.png",
)


def hits(run: Path) -> dict[str, bool]:
    """Stage -> whether it was computed."""
    return {name: hit["computed"] for name, hit in json.loads((run / "artifacts.json").read_text()).items()}


def sha(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture(scope="module")
def default_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("default")
    return job(folder, "debug=smoke")


def test_a_run_leaves_everything_that_a_person_looks_at(default_run: Path) -> None:
    for name in FILES:
        assert (default_run / name).stat().st_size > 0, name
    left = {path.relative_to(default_run).as_posix() for path in default_run.rglob("*") if path.is_file()}
    assert {name for name in left if not is_written(name)} <= {"config.yaml", "status.json", ".running.lock"}
    rows = json.loads((default_run / "results.json").read_text())["rows"]
    assert [row["method"] for row in rows] == ["float", "tfmq"]
    assert rows[1]["evaluator"]["name"] == "digits features"
    assert rows[1]["protocol"]["images"] == 24
    assert all(torch.isfinite(torch.tensor(list(row["scores"].values()))).all() for row in rows)
    units = list(csv.DictReader((default_run / "units.csv").open()))
    assert units[0]["unit"] == "temporal_information_block"
    assert {unit["phase"] for unit in units} == {"weights"}
    assert (
        sum(int(unit["layers"]) for unit in units) == json.loads((default_run / "quantized.json").read_text())["layers"]
    )


def test_the_artefact_samples_the_images_of_the_run(default_run: Path) -> None:
    stages = json.loads((default_run / "artifacts.json").read_text())
    path = Path(stages["activations"]["path"]) / "quantized.safetensors"
    model = serialization.load(path)
    recipe = serialization.load_recipe(path)
    images = recipe.images(model, seed=0, indices=range(8))
    assert recipe.sampling.sampler.calls(recipe.schedule) == model.context.timesteps
    shard = load_file(Path(stages["images"]["path"]) / "images-000000.safetensors")["images"]
    assert torch.equal(to_uint8(images, "round"), shard)


def test_a_second_run_computes_nothing_and_finds_the_same(default_run: Path) -> None:
    first = json.loads((default_run / "results.json").read_text())["rows"]
    again = job(default_run.parent, "debug=smoke")
    assert not any(hits(again).values())
    second = json.loads((again / "results.json").read_text())["rows"]
    assert [row["scores"] for row in second] == [row["scores"] for row in first]


def test_methods_share_what_they_have_in_common(default_run: Path) -> None:
    computed = hits(job(default_run.parent, "debug=smoke", "method=brecq"))
    assert not computed["trajectory"]
    assert not computed["float images"]
    assert computed["weights"]
    static = hits(job(default_run.parent, "debug=smoke", "method/scales=static"))
    assert not static["weights"]
    assert static["activations"]


@pytest.mark.parametrize(
    "overrides", [("method=nearest", "quant=w8a32"), ("method=brecq", "quant=w2a4"), ("until=weights",)]
)
def test_other_configurations_take_the_same_path(tmp_path: Path, overrides: tuple[str, ...]) -> None:
    run = job(tmp_path, "debug=smoke", *overrides)
    assert (run / "artifacts.json").is_file()


def test_the_artefact_is_the_model_that_made_the_images(default_run: Path) -> None:
    stages = json.loads((default_run / "artifacts.json").read_text())
    path = Path(stages["activations"]["path"]) / "quantized.safetensors"
    model = serialization.load(path)
    t = torch.tensor(model.context.timesteps)
    x = torch.randn(len(t), 1, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        first, second = model(x, t).sample, serialization.load(path)(x, t).sample
    assert torch.equal(first, second)
    parameters = sum(p.numel() for p in model.network.parameters())
    assert path.stat().st_size < 0.18 * 4 * parameters


def test_the_table_shows_spread_over_seeds(default_run: Path, tmp_path: Path) -> None:
    for seed in (0, 1):
        target = tmp_path / str(seed)
        job(target, "debug=smoke", "method=nearest", f"seed={seed}")
    header, rows = table(read_records(tmp_path))
    assert header[2] == "FID (digits features) ↓"
    assert [row[1] for row in rows] == ["float", "nearest"]
    assert "±" in rows[1][2]
    assert rows[1][-1] == "2"


def _run_in_child(folder: Path, *overrides: str) -> None:
    torch.set_num_threads(1)
    job(folder, "debug=smoke", *overrides)


def _kill_when(folder: Path, condition: Callable[[Path], bool], *overrides: str) -> None:
    """Start a job in a child process and SIGKILL it as soon as the store looks as wanted."""
    child = multiprocessing.get_context("fork").Process(target=_run_in_child, args=(folder, *overrides))
    child.start()
    deadline = time.monotonic() + 120
    while not condition(folder / "store"):
        assert child.is_alive(), "the job ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.001)
    assert child.pid is not None
    os.kill(child.pid, signal.SIGKILL)
    child.join()
    assert child.exitcode == -signal.SIGKILL


def _unfinished(store: Path, stage: str, pattern: str, count: int) -> bool:
    """Whether a stage has at least `count` files of a kind and is not finished."""
    return len(list(store.glob(f"{stage}/*/{pattern}"))) >= count and not list(store.glob(f"{stage}/*/manifest.json"))


@pytest.mark.parametrize(
    "condition",
    [
        lambda store: _unfinished(store, "weights", "units/*.safetensors", 3),
        lambda store: _unfinished(store, "images", "images-*.safetensors", 2),
    ],
    ids=["weights", "images"],
)
def test_a_killed_run_resumes_to_the_same_bytes(
    default_run: Path, tmp_path: Path, condition: Callable[[Path], bool]
) -> None:
    _kill_when(tmp_path, condition)
    kept = {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("store/weights/*/units/*.safetensors")}
    run = job(tmp_path, "debug=smoke")
    for path in tmp_path.glob("store/weights/*/units/*.safetensors"):
        assert kept.get(path.name, path.stat().st_mtime_ns) == path.stat().st_mtime_ns, (
            "a finished unit was learned again"
        )
    wanted = default_run.parent / "store"
    for pattern in ("activations/*/quantized.safetensors", "images/*/images-*.safetensors"):
        ours = {str(p.relative_to(tmp_path / "store")): sha(p) for p in (tmp_path / "store").glob(pattern)}
        theirs = {str(p.relative_to(wanted)): sha(p) for p in wanted.glob(pattern)}
        assert ours
        assert ours.items() <= theirs.items()
    assert json.loads((run / "results.json").read_text())["rows"][1]["scores"]


@pytest.mark.parametrize(("method", "stage"), [("qdrop", "weights")])
def test_a_run_killed_while_it_learns_scales_resumes_to_the_same_bytes(
    default_run: Path, tmp_path: Path, method: str, stage: str
) -> None:
    overrides = ("debug=smoke", f"method={method}", "until=activations")
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    for folder in (whole, killed):
        shutil.copytree(default_run.parent / "store/trajectory", folder / "store/trajectory")
    job(whole, *overrides)
    _kill_when(killed, lambda store: _unfinished(store, stage, "units/*.safetensors", 3), *overrides[1:])
    kept = {path: path.stat().st_mtime_ns for path in killed.glob(f"store/{stage}/*/units/*.safetensors")}
    job(killed, *overrides)
    assert len(kept) >= 3
    assert {path: path.stat().st_mtime_ns for path in kept} == kept, "a finished unit was learned again"
    ours, theirs = (
        {str(path.relative_to(folder)): sha(path) for path in folder.glob("store/activations/*/quantized.safetensors")}
        for folder in (killed, whole)
    )
    assert ours
    assert ours == theirs


def test_the_command_line(tmp_path: Path) -> None:
    """One real process, and what it prints when it fails: one line, and where its traceback is."""
    command = [sys.executable, str(CONF.parent / "run.py"), f"paths.outputs={tmp_path}", "debug=smoke"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "160"}
    good = subprocess.run([*command, "method=nearest"], capture_output=True, text=True, env=environment, check=False)
    assert good.returncode == 0, good.stderr
    assert "FID" in good.stdout
    assert "digits features" in good.stdout
    bad = subprocess.run([*command, "quant.weight=9"], capture_output=True, text=True, env=environment, check=False)
    assert bad.returncode == 1
    said, where = bad.stdout.strip().splitlines()
    assert said == "error: quant.weight must be a whole number from 2 to 8, or null (float), got 9"
    assert where.startswith("its traceback is in ")
    assert "Traceback" in Path(where.removeprefix("its traceback is in ")).read_text()
    assert "Traceback" not in bad.stderr
    log = next(iter(sorted(tmp_path.rglob("run.log"), reverse=True))).read_text()
    assert "Traceback" in log


def test_shards_hold_images_of_the_whole_seed_range(default_run: Path) -> None:
    stages = json.loads((default_run / "artifacts.json").read_text())
    shards = [load_file(p)["images"] for p in sorted(Path(stages["images"]["path"]).glob("images-*.safetensors"))]
    assert sum(len(shard) for shard in shards) == 24
    assert all(shard.dtype == torch.uint8 and shard.shape[1:] == (1, 16, 16) for shard in shards)

"""Folders that hold one another are refused by their keys; the usual layouts are not."""

from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from tests.e2e.jobs import composed
from tfmq_exp.cli.run_info import current_run
from tfmq_exp.cli.validation import FolderCheck, check_folders, real_images
from tfmq_exp.cli.validation import check as check_job

pytestmark = pytest.mark.bad_input


def check(root: Path, outputs: str, store: str, run: str, data: str = "data", *, moves: bool = False) -> None:
    for name in (outputs, store, run, data):
        (root / name).mkdir(parents=True, exist_ok=True)
    paths = {"outputs": str(root / outputs), "store": str(root / store)}
    cfg = OmegaConf.create({"paths": paths, "data": {"path": str(root / data)}})
    check_folders(cfg, root / run, moves=moves)
    real_images(cfg, root / run)


@pytest.mark.parametrize(
    "layout",
    [
        ("outputs", "outputs/store", "outputs/runs/1"),
        ("outputs", "elsewhere", "outputs/runs/1"),
        ("outputs", "store", "mine"),
        ("data/outputs", "data/outputs/store", "data/outputs/runs/1", "data/faces"),
        ("outputs", "outputs/store", "outputs/runs/1", "outputs/exported"),
    ],
)
def test_folders_beside_each_other(tmp_path: Path, layout: tuple[str, ...]) -> None:
    check(tmp_path, *layout)


@pytest.mark.parametrize(
    ("layout", "keys"),
    [
        (("outputs", ".", "outputs/runs/1"), ("hydra.run.dir", "paths.store")),
        (("outputs", "outputs", "outputs/runs/1"), ("hydra.run.dir", "paths.store")),
        (("outputs", "run", "run"), ("paths.store", "hydra.run.dir")),
        (("outputs", "run/store", "run"), ("paths.store", "hydra.run.dir")),
        (("outputs", "outputs/store", "."), ("paths.store", "hydra.run.dir")),
        (("outputs", "outputs/store", "outputs"), ("paths.store", "hydra.run.dir")),
        (("outputs", "outputs/store", "outputs/store/run"), ("hydra.run.dir", "paths.store")),
        (("store/outputs", "store", "elsewhere"), ("paths.outputs", "paths.store")),
        (("outputs", "outputs/store", "outputs/run", "outputs"), ("data.path", "paths.outputs")),
        (("outputs", "outputs/store", "outputs/run", "."), ("data.path", "paths.outputs")),
        (("outputs", "data/store", "outputs/run"), ("data.path", "paths.store")),
        (("outputs", "store", "data/run"), ("data.path", "hydra.run.dir")),
    ],
)
def test_folders_that_hold_each_other(tmp_path: Path, layout: tuple[str, ...], keys: tuple[str, str]) -> None:
    with pytest.raises(ValueError, match=f"{keys[0]}.*{keys[1]}"):
        check(tmp_path, *layout)


def test_links_are_followed_and_working_directories_stay(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "run")
    with pytest.raises(ValueError, match=r"paths\.store"):
        check(tmp_path, "outputs", "link/store", "run")
    with pytest.raises(ValueError, match=r"hydra\.job\.chdir must be false"):
        check(tmp_path, "outputs", "store", "mine", moves=True)


def start(tmp_path: Path, outputs: Any, store: Any, run: str) -> None:
    """What Hydra calls before it makes the folder of a job, or of a sweep."""
    (tmp_path / "file").touch()
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    hydra = {"run": {"dir": run}, "sweep": {"dir": run}}
    config = OmegaConf.create({"paths": {"outputs": outputs, "store": store}, "hydra": hydra})
    FolderCheck().on_run_start(config)
    FolderCheck().on_multirun_start(config)


@pytest.mark.parametrize(
    ("outputs", "store", "run", "words"),
    [
        (None, "store", "None/run", "paths.outputs must be a folder, got None"),
        ("", "store", "/run", "paths.outputs must be a folder, got ''"),
        (" ", "store", " /run", "paths.outputs must be a folder, got ' '"),
        ("out", None, "out/run", "paths.store must be a folder, got None"),
        ("out", "", "out/run", "paths.store must be a folder, got ''"),
        ("out", 3, "out/run", "paths.store must be a folder, got 3"),
        ("file", "file/store", "file/run", "paths.outputs=file is no folder"),
        ("out", "file", "out/run", "paths.store=file is no folder"),
        ("out", "dangling", "out/run", "paths.store=dangling is no folder, nor a link to one"),
        ("out", "loop", "out/run", "paths.store=loop is no folder"),
        ("out", "out/store", "file/run", "no folder file/run: Not a directory"),
        ("out", "out/store", "n" * 300, "File name too long"),
        ("/dev/null/out", "store", "/dev/null/out/run", "no folder /dev/null/out/run: Not a directory"),
    ],
)
def test_folders_that_cannot_be(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    outputs: Any,
    store: Any,
    run: str,
    words: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="1"):
        start(tmp_path, outputs, store, run)
    said = " ".join(capfd.readouterr().err.split())
    assert said.startswith("error: ")
    assert words in said
    assert {path.name for path in tmp_path.iterdir()} == {"file", "dangling", "loop"}


def test_names_that_would_put_a_run_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a/b", "../../x", "/tmp/x", "a/"):
        folders = {"run": {"dir": f"out/runs/1-{name}"}, "sweep": {"dir": "out/sweeps/1"}}
        config = {"name": name, "paths": {"outputs": "out", "store": "out/store"}, "hydra": folders}
        for begin in (FolderCheck().on_run_start, FolderCheck().on_multirun_start):
            with pytest.raises(SystemExit, match="1"):
                begin(OmegaConf.create(config))
            assert f"error: name={name}: a run's folder is called so" in " ".join(capfd.readouterr().err.split())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("key", ["name", "paths.outputs", "paths.store", "hydra.run.dir"])
@pytest.mark.parametrize("value", ["a/${x}", "${oc.env:NOT_THERE_AT_ALL}", "${unknown:x}"])
def test_references_to_what_is_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], key: str, value: str
) -> None:
    monkeypatch.chdir(tmp_path)
    folders = {"run": {"dir": "out/runs/1"}, "sweep": {"dir": "out/sweeps/1"}}
    config = OmegaConf.create({"name": "x", "paths": {"outputs": "out", "store": "out/store"}, "hydra": folders})
    OmegaConf.update(config, key, value)
    with pytest.raises(SystemExit, match="1"):
        FolderCheck().on_run_start(config)
    assert f"error: {key}: " in capfd.readouterr().err
    assert not list(tmp_path.iterdir())


def test_folders_that_are_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    start(tmp_path, "out", "out/store", "out/runs/1")
    assert (tmp_path / "out/runs/1").is_dir()
    assert not (tmp_path / "out/store").exists()


def test_images_that_are_not_read_may_be_anywhere(tmp_path: Path) -> None:
    data = ("model=digits", "data=image_folder", f"data.path={tmp_path}", "data.size=16")
    for goal in ("trajectory", "images"):
        check_job(composed(tmp_path / "out", *data, f"until={goal}"), current_run())
    scores = composed(tmp_path / "out", *data)
    with pytest.raises(ValueError, match=r"data\.path=.* holds paths\.outputs"):
        check_job(scores, current_run())
    with pytest.raises(
        ValueError, match=r"data\.path=.* holds paths\.outputs"
    ):  # as a training that begins asks for them
        real_images(scores, current_run().folder)

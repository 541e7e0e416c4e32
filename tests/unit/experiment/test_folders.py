"""Folders that hold one another are refused by their keys; the usual layouts are not."""

from pathlib import Path

import pytest
from omegaconf import OmegaConf

from tests.smoke.jobs import composed
from tfmq_exp.experiment.checks import check as check_job
from tfmq_exp.experiment.checks import real_images
from tfmq_exp.experiment.folders import check_folders, check_images_apart


def check(root: Path, outputs: str, store: str, run: str, data: str = "data", *, moves: bool = False) -> None:
    for name in (outputs, store, run, data):
        (root / name).mkdir(parents=True, exist_ok=True)
    paths = {"outputs": str(root / outputs), "store": str(root / store)}
    cfg = OmegaConf.create({"paths": paths, "data": {"path": str(root / data)}})
    check_folders(cfg, root / run, moves=moves)
    check_images_apart(cfg, root / run)


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


def test_images_that_are_not_read_may_be_anywhere(tmp_path: Path) -> None:
    data = ("model=digits", "data=image_folder", f"data.path={tmp_path}", "data.size=16")
    for goal in ("trajectory", "images"):
        check_job(composed(tmp_path / "out", *data, f"goal={goal}"))
    scores = composed(tmp_path / "out", *data)
    with pytest.raises(ValueError, match=r"data\.path=.* holds paths\.outputs"):
        check_job(scores)
    with pytest.raises(
        ValueError, match=r"data\.path=.* holds paths\.outputs"
    ):  # as a training that begins asks for them
        real_images(scores)

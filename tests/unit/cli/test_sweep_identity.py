"""Jobs are the same when nothing that decides results differs, and different when anything does."""

import os
import time
from pathlib import Path

import pytest
from omegaconf import DictConfig, OmegaConf, open_dict

from tests.e2e.jobs import composed
from tfmq_exp.cli.job_identity import files_read, job_identity, program_version, state_of
from tfmq_exp.pipeline.store import key_of


@pytest.fixture(scope="module")
def cfg(tmp_path_factory: pytest.TempPathFactory) -> DictConfig:
    return composed(tmp_path_factory.mktemp("composed"), "runtime=smoke", "method=brecq")


def key(cfg: DictConfig, *changes: str, command: tuple[str, ...] = ()) -> str:
    changed = OmegaConf.merge(cfg, OmegaConf.from_dotlist(list(changes)))
    assert isinstance(changed, DictConfig)
    return key_of("jobs", job_identity(changed, ["runtime=smoke", "method=brecq", *command]))


@pytest.mark.parametrize(
    "changes",
    [
        ("runtime.threads=3", "runtime.processes=2", "runtime.cache_gib=1", "runtime.cache_dir=elsewhere"),
        (
            "runtime.traceback=true",
            "runtime.estimate=false",
            "paths.store=elsewhere",
            "paths.outputs=elsewhere",
            "repeat=true",
        ),
    ],
)
def test_where_and_how_the_work_is_done_changes_nothing(cfg: DictConfig, changes: tuple[str, ...]) -> None:
    assert key(cfg, *changes, command=changes) == key(cfg)


def test_everything_else_does(cfg: DictConfig) -> None:
    changes = (
        (),
        ("seed=1",),
        ("quant.weight=8",),
        ("goal=weights",),
        ("runtime.batch=5",),
        ("runtime.parts=2",),
        ("model.protocol.images=25",),
        ("eval.weights=a/file",),
        ("eval.weights=another/file",),
        ("logger._target_=tfmq_exp.loggers.wandb.Wandb",),
    )
    with open_dict(cfg):
        keys = {key(cfg, *changed) for changed in changes}
    assert len(keys) == len(changes)
    assert key(cfg, command=("method/weight_observer=lp",)) != key(cfg), "rows of tables are named after such words"


def test_another_file_under_the_same_name_is_another_job(cfg: DictConfig, tmp_path: Path) -> None:
    weights = tmp_path / "weights.safetensors"
    absent = key(cfg, f"model.denoiser.path={weights}")
    weights.write_bytes(b"one")
    one = key(cfg, f"model.denoiser.path={weights}")
    assert key(cfg, f"model.denoiser.path={weights}") == one
    weights.write_bytes(b"two")
    os.utime(weights, ns=(1, 1))
    assert len({absent, one, key(cfg, f"model.denoiser.path={weights}")}) == 3


def test_a_folder_is_all_files_below_it(tmp_path: Path) -> None:
    (tmp_path / "images/part").mkdir(parents=True)
    image = tmp_path / "images/part/0.png"
    image.write_bytes(b"pixels")
    seen = [state_of(tmp_path / "images")]
    image.write_bytes(b"others")
    os.utime(image, ns=(1, 1))
    seen.append(state_of(tmp_path / "images"))
    (tmp_path / "images/part/1.png").write_bytes(b"more")
    seen.append(state_of(tmp_path / "images"))
    assert len(set(seen)) == 3
    settings = {
        "name": str(tmp_path),
        "data": [{"path": f"{tmp_path}/images"}],
        "logger": {"at": str(image)},
        "x": "",
        "n": 1,
    }
    assert files_read(settings) == {f"{tmp_path}/images": seen[-1]}


@pytest.mark.parametrize("behind", ["", "a link to the file", "a link to its folder"])
@pytest.mark.parametrize("how", ["in place", "moved into place"])
def test_a_change_of_content_shows_where_size_and_time_are_restored(tmp_path: Path, behind: str, how: str) -> None:
    image = tmp_path / "elsewhere/part/0.png"
    image.parent.mkdir(parents=True)
    image.write_bytes(b"pixels")
    folder = tmp_path / "images" if behind else image.parent
    if behind:
        folder.mkdir()
        (folder / "link").symlink_to(image if behind == "a link to the file" else image.parent)
    before, times = state_of(folder), image.stat()
    assert state_of(folder) == before
    time.sleep(0.02)  # longer than a tick of the file system's context
    if how == "in place":
        image.write_bytes(b"others")
    else:
        (tmp_path / "new").write_bytes(b"others")
        os.utime(tmp_path / "new", ns=(times.st_atime_ns, times.st_mtime_ns))
        (tmp_path / "new").replace(image)
    os.utime(image, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert image.stat().st_mtime_ns == times.st_mtime_ns
    assert state_of(folder) != before


def test_links_that_lead_nowhere_or_in_circles_are_parts_of_a_folder(tmp_path: Path) -> None:
    (tmp_path / "set/part").mkdir(parents=True)
    (tmp_path / "set/part/up").symlink_to(tmp_path / "set")
    (tmp_path / "set/part/self").symlink_to("self")
    before = state_of(tmp_path / "set")
    (tmp_path / "set/gone").symlink_to(tmp_path / "absent")
    between = state_of(tmp_path / "set")
    (tmp_path / "absent").write_bytes(b"")
    after = state_of(tmp_path / "set")
    (tmp_path / "set" / os.fsdecode(b"\xff.png")).write_bytes(b"")  # a name that is no UTF-8
    assert len({before, between, after, state_of(tmp_path / "set")}) == 4


def test_the_program_is_all_that_the_package_holds(tmp_path: Path) -> None:
    (tmp_path / "part").mkdir()
    (tmp_path / "part/code.py").write_text("x = 1\n")
    first = program_version(tmp_path)
    (tmp_path / "part/__pycache__").mkdir()
    (tmp_path / "part/__pycache__/code.pyc").write_bytes(b"compiled")
    assert program_version(tmp_path) == first
    (tmp_path / "part/code.py").write_text("x = 2\n")
    second = program_version(tmp_path)
    (tmp_path / "part/code.py").rename(tmp_path / "part/other.py")
    assert len({first, second, program_version(tmp_path)}) == 3

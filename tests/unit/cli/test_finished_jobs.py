"""Job cache: jobs are the same when nothing that decides results differs; what a finished one leaves for another."""

import json
import os
import time
from pathlib import Path
from zipfile import ZipFile

import pytest
from omegaconf import DictConfig, OmegaConf, open_dict

from tests.e2e.jobs import composed
from tfmq_exp.cli.finished_jobs import (
    LARGEST,
    claim,
    files_read,
    is_written,
    job_identity,
    keep,
    left_in,
    program_version,
    state_of,
    take,
)
from tfmq_exp.pipeline.store import Entry, Store, key_of


@pytest.fixture(scope="module")
def cfg(tmp_path_factory: pytest.TempPathFactory) -> DictConfig:
    return composed(tmp_path_factory.mktemp("composed"), "debug=smoke", "method=brecq")


def key(cfg: DictConfig, *changes: str, command: tuple[str, ...] = ()) -> str:
    changed = OmegaConf.merge(cfg, OmegaConf.from_dotlist(list(changes)))
    assert isinstance(changed, DictConfig)
    return key_of("jobs", job_identity(changed, ["debug=smoke", "method=brecq", *command]))


@pytest.mark.parametrize(
    "changes",
    [
        (
            "runtime.threads=3",
            "runtime.processes=2",
            "runtime.activation_cache_gib=1",
            "runtime.activation_cache_dir=elsewhere",
        ),
        (
            "runtime.traceback=true",
            "runtime.estimate=false",
            "paths.store=elsewhere",
            "paths.outputs=elsewhere",
            "force=true",
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
        ("until=weights",),
        ("runtime.batch_size=5",),
        ("runtime.microbatches=2",),
        ("protocol.sampling.images=25",),
        ("eval.extract.weights=a/file",),
        ("eval.extract.weights=another/file",),
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


def stage(store: Store) -> Entry:
    entry = store.entry("weights", {"a": 1})
    store.get_or_compute(entry, lambda folder: store.write_json(folder / "x.json", 1))
    return entry


def run_folder(folder: Path, *stages: Entry) -> Path:
    (folder / "diagnosis").mkdir(parents=True)
    hits = {entry.stage: {"path": str(entry.path), "computed": True, "seconds": 1.0} for entry in stages}
    (folder / "artifacts.json").write_text(json.dumps(hits))
    (folder / "results.json").write_text('{"rows": []}')
    (folder / "diagnosis/unit_sensitivity.csv").write_text("unit\n")
    return folder


def test_only_files_that_jobs_write_are_kept(tmp_path: Path) -> None:
    """A run folder that is somebody's home, with a store and links in it."""
    folder = run_folder(tmp_path)
    for name in ("mine.txt", "other.json", "store/weights/0/results.json", "photos/samples.png", "diagnosis/notes.txt"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("mine")
    (folder / "samples.png").symlink_to(folder / "mine.txt")
    kept = {path.relative_to(folder).as_posix() for path in left_in(folder)}
    assert kept == {"artifacts.json", "results.json", "diagnosis/unit_sensitivity.csv"}


@pytest.mark.parametrize(
    "name", ["../results.json", "/results.json", "a/results.json", "diagnosis/../x.csv", "run.py", "diagnosis/a/b.csv"]
)
def test_other_names_are_not_unpacked(tmp_path: Path, name: str) -> None:
    assert not is_written(name)
    store, folder = Store(tmp_path / "store"), tmp_path / "runs/new"
    record = store.entry("jobs", {})

    def fill(target: Path) -> None:
        with ZipFile(target / "left.zip", "w") as archive:
            archive.writestr(name, "hostile")
        (target / "artifacts.json").write_text("{}")
        (target / "origin.json").write_text(json.dumps({"folder": "old"}))

    store.get_or_compute(record, fill)
    folder.mkdir(parents=True)
    assert take(store, record, folder) == Path("old")
    assert [path.name for path in (tmp_path / "runs").rglob("*") if path.is_file()] == ["artifacts.json"]


@pytest.mark.parametrize("what", ["folder", "manifest.json", "x.json", "turned"])
def test_a_job_is_found_again_once_its_stage_is_there_again(tmp_path: Path, what: str) -> None:
    store = Store(tmp_path / "store")
    weights = stage(store)
    record, folder = store.entry("jobs", {}), run_folder(tmp_path / "run", weights)
    keep(store, record, folder)
    assert take(store, record, folder) == folder
    gone = weights.path if what == "folder" else weights.path / what
    if what == "turned":
        manifest = weights.path / "manifest.json"
        manifest.write_text(manifest.read_text().replace("weights", "weighty"))
    else:
        gone.rename(tmp_path / "away")
    assert take(store, record, folder) is None
    if what != "turned":
        (tmp_path / "away").rename(gone)
        assert take(store, record, folder) == folder


def test_too_much_is_not_kept_and_the_job_is_done_all_the_same(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store, folder = Store(tmp_path / "store"), run_folder(tmp_path / "run")
    with (folder / "losses.csv").open("wb") as file:
        file.truncate(LARGEST)  # a hole
    record = store.entry("jobs", {})
    keep(store, record, folder)
    assert not record.path.exists()
    assert "more than 268 MB" in caplog.text


def test_a_folder_of_another_job_does_not_keep_its_results(tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "run")
    (folder / "mine.csv").write_text("")
    claim(folder, OmegaConf.create({"seed": 0}))
    assert (folder / "results.json").is_file(), "no job was here"
    (folder / "config.yaml").write_text("seed: 0\n")
    claim(folder, OmegaConf.create({"seed": 0}))
    assert (folder / "results.json").is_file(), "the same job goes on"
    claim(folder, OmegaConf.create({"seed": 1}))
    assert sorted(path.name for path in folder.rglob("*") if path.is_file()) == ["config.yaml", "mine.csv"]

"""What a finished job leaves for another that is the same, and what it does not take along."""

import json
from pathlib import Path
from zipfile import ZipFile

import pytest

from tfmq_exp.cli.job_cache import LARGEST, clear, is_written, keep, left_in, take
from tfmq_exp.pipeline.store import Entry, Store


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
        weights.manifest_path.write_text(weights.manifest_path.read_text().replace("weights", "weighty"))
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
    clear(folder, "seed: 0\n")
    assert (folder / "results.json").is_file(), "no job was here"
    (folder / "config.yaml").write_text("seed: 0\n")
    clear(folder, "seed: 0\n")
    assert (folder / "results.json").is_file(), "the same job goes on"
    clear(folder, "seed: 1\n")
    assert sorted(path.name for path in folder.rglob("*") if path.is_file()) == ["config.yaml", "mine.csv"]

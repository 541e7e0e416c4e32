"""Hashes of files, remembered and not: an index never changes an answer."""

import hashlib
import logging
import os
import random
import sqlite3
import threading
import time
from pathlib import Path

import pytest

from tfmq_exp.data import hashes
from tfmq_exp.data.hashes import hash_file, hash_files

pytestmark = pytest.mark.bad_input


@pytest.fixture
def files(tmp_path: Path) -> Path:
    folder = tmp_path / "files"
    folder.mkdir()
    for i in range(9):
        (folder / str(i)).write_bytes(bytes(range(i, 200)))
    return folder


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files that are read, as they are."""
    names: list[str] = []
    original = hashes._hash

    def noted(path: Path) -> bytes:
        names.append(path.name)
        return original(path)

    monkeypatch.setattr(hashes, "_hash", noted)
    monkeypatch.setattr(hashes, "YOUNG", -1)
    return names


def found(folder: Path, index: Path) -> list[bytes]:
    names = sorted(os.listdir(folder))
    answer = list(hash_files(folder, names, index))
    assert answer == [hashlib.sha256((folder / name).read_bytes()).digest() for name in names]
    return answer


def test_a_file_is_read_once(files: Path, tmp_path: Path, read: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hashes, "PART", 4)
    for _ in range(3):
        found(files, tmp_path / "new/index")
        assert sorted(read) == [str(i) for i in range(9)]
    os.link(files / "3", files / "another name")
    os.utime(files / "5")
    read.clear()
    found(files, tmp_path / "new/index")
    assert sorted(read) in (["3", "5"], ["5", "another name"], ["3", "5", "another name"])  # a link changes the status


@pytest.mark.parametrize("how", ["in place", "moved into place", "by a link"])
def test_other_content_of_the_same_size_and_time_is_noticed(
    files: Path, tmp_path: Path, read: list[str], how: str
) -> None:
    before, state = found(files, tmp_path / "index"), (files / "3").stat()
    time.sleep(0.02)  # longer than a tick of the file system's context
    target = files / "3" if how == "in place" else tmp_path / "other"
    target.write_bytes(bytes(197))
    os.utime(target, ns=(state.st_atime_ns, state.st_mtime_ns))
    if how == "moved into place":
        target.replace(files / "3")
    if how == "by a link":
        (files / "3").unlink()
        (files / "3").symlink_to(target)
    assert ((files / "3").stat().st_size, (files / "3").stat().st_mtime_ns) == (state.st_size, state.st_mtime_ns)
    after = found(files, tmp_path / "index")
    assert [a == b for a, b in zip(before, after, strict=True)] == [i != 3 for i in range(9)]


def test_young_files_are_not_remembered(
    files: Path, tmp_path: Path, read: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hashes, "YOUNG", 10**12)
    for count in (1, 2):
        found(files, tmp_path / "index")
        assert len(read) == 9 * count


@pytest.mark.parametrize("damage", ["text", "empty", "truncated", "another table", "a folder"])
def test_an_index_that_is_damaged_changes_nothing(files: Path, tmp_path: Path, read: list[str], damage: str) -> None:
    index = tmp_path / "index"
    found(files, index)
    content = index.read_bytes()
    index.unlink()
    if damage == "a folder":
        index.mkdir()
    elif damage == "another table":
        with sqlite3.connect(index) as database:
            database.execute("CREATE TABLE states (x)")
    else:
        index.write_bytes(
            {"text": b"no database" * 999, "empty": b"", "truncated": content[: len(content) // 2]}[damage]
        )
    found(files, index)
    found(files, index)
    found(files, index)
    assert damage == "a folder" or len(read) < 9 * 4, "it is made again"


@pytest.mark.parametrize("seed", range(6))
def test_whatever_byte_of_the_index_is_wrong_the_hashes_are_right(
    files: Path, tmp_path: Path, read: list[str], seed: int
) -> None:
    index, generator = tmp_path / "index", random.Random(seed)
    found(files, index)
    content = index.read_bytes()
    for _ in range(25):
        changed = bytearray(content)
        for _ in range(generator.choice((1, 40))):
            changed[generator.randrange(len(changed))] ^= 1 << generator.randrange(8)
        index.write_bytes(changed)
        found(files, index)


def test_an_index_out_of_reach_is_done_without(
    files: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.INFO)
    (tmp_path / "file").write_bytes(b"")
    found(files, tmp_path / "file/below/index")
    assert "hashes of files are not remembered" in caplog.text
    monkeypatch.setattr(hashes, "WAIT", 0.05)
    monkeypatch.setattr(hashes, "YOUNG", -1)
    found(files, tmp_path / "index")
    busy = sqlite3.connect(tmp_path / "index", isolation_level="EXCLUSIVE")
    busy.execute("BEGIN EXCLUSIVE")
    (files / "0").write_bytes(b"changed")
    found(files, tmp_path / "index")
    assert "database is locked" in caplog.text
    busy.close()


def test_several_jobs_use_one_index(files: Path, tmp_path: Path, read: list[str]) -> None:
    failed: list[BaseException] = []

    def work() -> None:
        try:
            for _ in range(3):
                found(files, tmp_path / "index")
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    read.clear()
    found(files, tmp_path / "index")
    assert not read


def test_what_cannot_be_hashed_is_named(files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    os.mkfifo(files / "pipe")
    with pytest.raises(ValueError, match="pipe is no regular file"):
        hash_file(files / "pipe")
    with pytest.raises(FileNotFoundError, match=r"cannot read .*gone: No such file"):
        hash_file(files / "gone")
    original = hashes._hash

    def slow(path: Path) -> bytes:
        digest = original(path)
        time.sleep(0.02)
        path.write_bytes(b"another content")
        return digest

    monkeypatch.setattr(hashes, "_hash", slow)
    with pytest.raises(ValueError, match="7 was written to while it was read"):
        hash_file(files / "7")


def test_long_work_says_how_far_it_is(
    files: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    found(files, tmp_path / "index")
    assert not caplog.records
    monkeypatch.setattr(hashes, "PART", 4)
    monkeypatch.setattr(hashes, "MUCH", 700)
    found(files, tmp_path / "another")
    said = [record.getMessage() for record in caplog.records]
    assert said == [f"hashing files of {files}, once: {n} of 9 are done" for n in (0, 4)]


def test_the_index_is_in_the_users_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert hashes.default_index() == tmp_path / "tfmq_exp/file_hashes.sqlite"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert hashes.default_index() == tmp_path / "home/.cache/tfmq_exp/file_hashes.sqlite"

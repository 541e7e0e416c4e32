"""Folders with files of every kind in them: taken, counted, or named as what they are; and what is done to them meanwhile."""

import os
import socket
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tfmq_exp.data.folder import ImageFolder, find_images
from tfmq_exp.data.preparation import Unchanged

pytestmark = pytest.mark.bad_input

RGB = Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8))


def source(folder: Path) -> ImageFolder:
    return ImageFolder(str(folder), 16, Unchanged())


def test_what_is_no_image_is_counted_and_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    RGB.save(tmp_path / "a.png")
    others = ["a.heic", "B.HEIC", "x/c.psd", "notes.txt", "LICENSE", "set.zip", "a.eps", "v.\x1b[31m", "a.png.bak"]
    hidden = [".DS_Store", "._a.png", "Thumbs.db", "__MACOSX/b.png", "desktop.ini", ".git/c.png", "@eaDir/d.png"]
    for name in (*others, *hidden):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    os.mkfifo(tmp_path / "pipe.png")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "socket.png"))
        (tmp_path / "zero.png").symlink_to("/dev/zero")
        found = source(tmp_path)
    counts = {".bak": 1, ".eps": 1, ".heic": 2, ".psd": 1, ".txt": 1, ".zip": 1, "no regular file": 3, "no suffix": 2}
    assert found.names == ["a.png"]
    assert found.identity["left_out"] == counts
    assert f"12 files in {tmp_path} are left out" in caplog.text
    assert "2 .heic" in caplog.text
    assert "\x1b" not in caplog.text
    assert len(list(found.batches(4))) == 1


@pytest.mark.parametrize(
    "name", [b"\xff\xfe.png", b"a b.png", b"\n.png", "ä\u2028.png".encode(), b"[red].png", b"%s.png"]
)
def test_names_are_any_bytes(tmp_path: Path, name: bytes) -> None:
    RGB.save(tmp_path / os.fsdecode(name))
    found = source(tmp_path)
    assert found.names == [os.fsdecode(name)]
    assert next(found.batches(1)).shape == (1, 3, 16, 16)


def test_a_folder_of_images_alone_says_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    RGB.save(tmp_path / "a.png")
    assert "left_out" not in source(tmp_path).identity
    assert not caplog.records


def test_folders_with_several_names_count_once(tmp_path: Path) -> None:
    """Their own name first; a folder above is not a part of what is below it."""
    for name in ("set/z/1.png", "set/z/y/2.png", "away/deep/3.png", "sibling/4.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        RGB.save(tmp_path / name)
    links = {"a": "set/z", "z/y/up": "set", "z/self": "set/z", "c": "away", "b": "away/deep", "top": "", "d": "away"}
    for name, target in links.items():
        (tmp_path / "set" / name).symlink_to(tmp_path / target, target_is_directory=True)
    (tmp_path / "away/deep/back").symlink_to(tmp_path / "away", target_is_directory=True)
    (tmp_path / "set/one.png").symlink_to(tmp_path / "sibling/4.png")
    assert find_images(tmp_path / "set") == (["b/3.png", "one.png", "z/1.png", "z/y/2.png"], {})
    (tmp_path / "root").symlink_to(tmp_path / "set")
    assert find_images(tmp_path / "root")[0] == ["b/3.png", "one.png", "z/1.png", "z/y/2.png"]


@pytest.mark.parametrize("name", ["a.png", "folder", "deep/b.jpg"])
@pytest.mark.parametrize("target", ["nowhere", "{name}"])
def test_links_that_lead_nowhere_are_named(tmp_path: Path, name: str, target: str) -> None:
    RGB.save(tmp_path / "z.png")
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).symlink_to(tmp_path / target.format(name=name))
    with pytest.raises(FileNotFoundError, match=f"1 links in .* lead nowhere, the first is {name}"):
        source(tmp_path)


def test_folders_and_files_that_may_not_be_read_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "inner").mkdir()
    RGB.save(tmp_path / "a.png")
    scandir, opened = os.scandir, Path.open

    def refused(path: Path | str, *rest: object) -> object:
        if os.path.basename(path) in ("inner", "a.png"):
            raise PermissionError(13, "Permission denied", str(path))
        return (opened if rest else scandir)(path, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(os, "scandir", refused)
        with pytest.raises(PermissionError, match=r"cannot list the folder .*inner: Permission denied"):
            source(tmp_path)
    monkeypatch.setattr(Path, "open", refused)
    with pytest.raises(PermissionError, match=r"cannot read .*a\.png: Permission denied"):
        source(tmp_path)


def test_a_folder_that_changes_under_way_is_named(tmp_path: Path) -> None:
    for name in "abc":
        RGB.save(tmp_path / f"{name}.png")
    found = source(tmp_path)
    (tmp_path / "b.png").unlink()
    with pytest.raises(
        ValueError, match=r"b\.png was there when the folder was looked through, and cannot be read now"
    ):
        list(found.batches(2))
    RGB.rotate(90).save(tmp_path / "b.png")
    with pytest.raises(ValueError, match=r"b\.png has changed since the folder was looked through"):
        list(found.batches(2))
    RGB.save(tmp_path / "b.png")
    assert len(next(found.batches(3))) == 3

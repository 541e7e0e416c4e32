"""Folders of images: order, batches, identity, and what is said of folders that are not as they should be."""

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from tfmq_exp.data import decoding
from tfmq_exp.data.folder import ImageFolder
from tfmq_exp.data.preparation import CropThenResize, ResizeThenCrop, Unchanged

pytestmark = pytest.mark.bad_input

# in the order of code points, that of their places in the set
NAMES = ["10.png", "2.PNG", "B/1.png", "a-b/1.png", "a.png", "a/b/1.png", "a/b/10.webp", "a/b/2.png", "b.png"]


def pixels(i: int) -> np.ndarray:
    """An image that no other resembles."""
    return np.random.default_rng(i).integers(0, 256, (8, 8, 3), dtype=np.uint8)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for i, name in reversed(list(enumerate(NAMES))):
        path = tmp_path / "set" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels(i)).save(path, lossless=True)
    for name in ("notes.txt", "a/._1.png", ".cache/1.png", "a/b/labels.json"):
        path = tmp_path / "set" / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"no image")
    return tmp_path / "set"


def expected() -> Tensor:
    return torch.from_numpy(np.stack([pixels(i) for i in range(len(NAMES))])).permute(0, 3, 1, 2)


def test_all_images_come_in_the_order_of_their_paths(folder: Path) -> None:
    source = ImageFolder(str(folder), 8, Unchanged())
    assert source.names == NAMES
    assert (len(source), source.shape) == (len(NAMES), (3, 8, 8))
    (found,) = source.batches(100)
    assert found.equal(expected())


def test_grey_images_have_one_channel_of_luma(folder: Path) -> None:
    source = ImageFolder(str(folder), 8, Unchanged(), grey=True)
    assert source.shape == (1, 8, 8)
    (found,) = source.batches(100)
    weights = torch.tensor([0.299, 0.587, 0.114]).reshape(3, 1, 1)  # ITU-R BT.601
    torch.testing.assert_close(found.float(), (expected() * weights).sum(1, keepdim=True), rtol=0, atol=1)
    assert source.identity != ImageFolder(str(folder), 8, Unchanged()).identity


@pytest.mark.parametrize("size", [1, 2, 4, 9, 10])
def test_batches_have_the_size_asked_for_and_together_are_the_set(folder: Path, size: int) -> None:
    source = ImageFolder(str(folder), 8, Unchanged())
    parts = list(source.batches(size))
    assert [len(part) for part in parts[:-1]] == [size] * (len(parts) - 1)
    assert torch.cat(parts).equal(expected())
    assert torch.cat(list(source.batches(size))).equal(expected())  # a second time


def test_two_readers_do_not_disturb_each_other(folder: Path) -> None:
    source = ImageFolder(str(folder), 8, Unchanged())
    for a, b in zip(source.batches(1), source.batches(1), strict=True):
        assert a.equal(b)


def test_images_are_prepared(folder: Path) -> None:
    source = ImageFolder(str(folder), 4, CropThenResize())
    assert next(source.batches(1)).shape == (1, 3, 4, 4)


def test_gray_palette_and_transparent_images_become_rgb(tmp_path: Path) -> None:
    gray = pixels(0)[..., 0]
    for name, mode in (("1.png", "L"), ("2.png", "P"), ("3.png", "RGBA"), ("4.png", "LA")):
        Image.fromarray(gray).convert(mode).save(tmp_path / name)
    (found,) = ImageFolder(str(tmp_path), 8, Unchanged()).batches(4)
    assert found.equal(torch.from_numpy(gray).expand(4, 3, 8, 8))


def test_links_are_followed(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "links").mkdir()
    (tmp_path / "links" / "inner").symlink_to(folder / "a", target_is_directory=True)
    assert ImageFolder(str(tmp_path / "links"), 8, Unchanged()).names[0] == "inner/b/1.png"


def test_a_listing_chooses_images(folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    listing = tmp_path / "train.txt"
    listing.write_text("a/b/2.png\n\n2.PNG \na/b/2.png\n./a//b/x/../2.png\n")
    source = ImageFolder(str(folder), 8, Unchanged(), str(listing))
    assert "2 lines of" in caplog.text
    assert source.names == ["2.PNG", "a/b/2.png"]
    (found,) = source.batches(9)
    assert found.equal(expected()[[1, 7]])
    assert source.identity != ImageFolder(str(folder), 8, Unchanged()).identity
    listing.write_text("2.PNG\nc.png\n")
    with pytest.raises(FileNotFoundError, match=r"1 of 2 images listed in .* c\.png"):
        ImageFolder(str(folder), 8, Unchanged(), str(listing))
    with pytest.raises(FileNotFoundError, match="no listing at nowhere"):
        ImageFolder(str(folder), 8, Unchanged(), "nowhere")


@pytest.mark.parametrize("name", ["../secret.png", "a/../../secret.png", "/etc/passwd", "..", "//a.png"])
def test_a_listing_stays_in_its_folder(folder: Path, tmp_path: Path, name: str) -> None:
    Image.fromarray(pixels(0)).save(tmp_path / "secret.png")
    (tmp_path / "train.txt").write_text(f"a.png\n{name}\n")
    with pytest.raises(
        ValueError, match=r"train\.txt leads out of the folder of images; expected paths relative to it"
    ):
        ImageFolder(str(folder), 8, Unchanged(), str(tmp_path / "train.txt"))


def test_identity_tells_sets_apart_and_nothing_else(folder: Path, tmp_path: Path) -> None:
    def identity(path: Path = folder, size: int = 8) -> str:
        return str(ImageFolder(str(path), size, CropThenResize()).identity)

    before = identity()
    assert before == identity()
    assert identity(folder.rename(tmp_path / "elsewhere")) == before
    folder = (tmp_path / "elsewhere").rename(folder)
    assert identity(size=16) != before
    seen = {before, identity(size=16)}
    for preparation in (CropThenResize("bilinear"), ResizeThenCrop("bilinear"), Unchanged()):
        seen.add(str(ImageFolder(str(folder), 8, preparation).identity))
    assert len(seen) == 5
    with (folder / "a.png").open("ab") as file:
        file.write(b"\0")
    seen.add(identity())
    (folder / "a.png").rename(folder / "a.jpg")  # another name in the same place
    assert identity() in seen
    (folder / "a.jpg").rename(folder / "zz.png")
    seen.add(identity())
    (folder / "zz.png").unlink()
    seen.add(identity())
    assert len(seen) == 8


def test_identity_reads_no_image(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "open", lambda *_: pytest.fail("an image was opened"))
    assert ImageFolder(str(folder), 8, Unchanged()).identity["images"] == len(NAMES)


def test_a_missing_folder_says_what_belongs_there(tmp_path: Path) -> None:
    with pytest.raises(
        FileNotFoundError, match=r"nowhere; expected there: faces of https://example\.org \(nothing is downl"
    ):
        ImageFolder(str(tmp_path / "nowhere"), 8, Unchanged(), origin="faces of https://example.org")


def test_an_archive_in_the_place_of_a_folder(tmp_path: Path) -> None:
    (tmp_path / "faces.zip").touch()
    with pytest.raises(FileNotFoundError, match=r"faces\.zip is a file, no folder; expected there: any images"):
        ImageFolder(str(tmp_path / "faces.zip"), 8, Unchanged())


def test_a_folder_without_images_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").touch()
    with pytest.raises(ValueError, match=r"no images \(\.png, \.apng, \.jpg, .*\.qoi\) in .*expected: any images"):
        ImageFolder(str(tmp_path), 8, Unchanged())


@pytest.mark.parametrize("damage", ["empty", "text", "truncated"])
def test_an_unreadable_image_is_named(folder: Path, damage: str) -> None:
    path = folder / "a" / "b" / "1.png"
    path.write_bytes({"empty": b"", "text": b"<html>", "truncated": path.read_bytes()[:-60]}[damage])
    batches = ImageFolder(str(folder), 8, Unchanged()).batches(2)
    assert len(next(batches)) == 2
    with pytest.raises(ValueError, match=r"a/b/1\.png cannot be read as an image \("):
        list(batches)


def test_sixteen_bits_are_refused(tmp_path: Path) -> None:
    Image.fromarray(np.full((8, 8), 40_000, dtype=np.uint16)).save(tmp_path / "a.png")
    with pytest.raises(ValueError, match=r"a\.png has pixels of mode I;16, .*; expected at most 8 bits"):
        next(ImageFolder(str(tmp_path), 8, Unchanged()).batches(1))


def test_images_of_two_sizes_are_refused(folder: Path) -> None:
    Image.fromarray(pixels(0)[:6]).save(folder / "b.png")
    with pytest.raises(ValueError, match=r"b\.png is 8x6 after Unchanged, expected 8x8.*choose a preparation"):
        list(ImageFolder(str(folder), 8, Unchanged()).batches(3))


@pytest.mark.parametrize("size", [0, -1])
def test_a_batch_without_images_is_refused_at_once(folder: Path, size: int) -> None:
    with pytest.raises(ValueError, match=f"at least one image, got {size}"):
        ImageFolder(str(folder), 8, Unchanged()).batches(size)


def test_threads_keep_the_order_and_hold_few_images(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoding, "WAITING", 5)
    drawn: list[int] = []
    threads: set[int] = set()

    def items() -> Iterator[int]:
        for i in range(40):
            drawn.append(i)
            yield i

    def slow(i: int) -> np.ndarray:
        threads.add(threading.get_ident())
        time.sleep(0.004 if i % 3 == 0 else 0)  # later ones are done earlier
        return np.full((1, 1, 3), i, dtype=np.uint8)

    taken = 0
    for found in decoding.in_order(slow, items()):
        assert found[0, 0, 0] == taken
        taken += 1
        assert len(drawn) <= taken + 5
    assert taken == 40
    assert len(threads) > 1
    assert threading.get_ident() not in threads


def test_whoever_stops_early_leaves_no_threads_behind(folder: Path) -> None:
    before = threading.active_count()
    batches = ImageFolder(str(folder), 8, Unchanged()).batches(1)
    next(batches)
    del batches
    assert threading.active_count() == before

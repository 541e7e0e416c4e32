"""LSUN's databases, against ones that are written here."""

import json
import shutil
from io import BytesIO
from pathlib import Path

import lmdb
import numpy as np
import pytest
import torch
from PIL import Image

from tfmq_exp.data.lsun import LSUN
from tfmq_exp.data.preparation import CropThenResize, Unchanged


def pixels(i: int) -> np.ndarray:
    return np.random.default_rng(i).integers(0, 256, (8 + i, 11, 3), dtype=np.uint8)


def encoded(i: int) -> bytes:
    file = BytesIO()
    Image.fromarray(pixels(i)).save(file, "WEBP" if i % 2 else "PNG", lossless=True)
    return file.getvalue()


def write(path: Path, entries: dict[bytes, bytes]) -> None:
    with lmdb.open(str(path), map_size=1 << 24) as database, database.begin(write=True) as transaction:
        for key, value in entries.items():
            transaction.put(key, value)


@pytest.fixture
def database(tmp_path: Path) -> Path:
    path = tmp_path / "church_outdoor_train_lmdb"
    write(path, {f"{i:040x}".encode(): encoded(i) for i in (3, 0, 4, 1, 2)})
    (path / "lock.mdb").unlink()  # as on a disk that cannot be written
    return path


def test_images_come_in_the_order_of_their_keys_whatever_the_batch(database: Path) -> None:
    source = LSUN(str(database), 6)
    assert (len(source), source.shape) == (5, (3, 6, 6))
    expected = np.stack([CropThenResize("bicubic")(Image.fromarray(pixels(i)), 6) for i in range(5)])
    for size in (1, 2, 5, 7):
        parts = list(source.batches(size))
        assert len(parts[0]) == min(size, 5)
        assert torch.cat(parts).equal(torch.from_numpy(expected).permute(0, 3, 1, 2))
    assert not (database / "lock.mdb").exists()


def test_identity_is_that_of_the_database_and_the_preparation(database: Path, tmp_path: Path) -> None:
    before = LSUN(str(database), 6).identity
    assert json.loads(json.dumps(before)) == before
    copy = tmp_path / "copy" / database.name
    shutil.copytree(database, copy)
    assert LSUN(str(copy), 6).identity == before
    (tmp_path / "link").symlink_to(database)
    assert LSUN(str(tmp_path / "link"), 6).identity == before
    others = [
        LSUN(str(database), 7),
        LSUN(str(database), 6, Unchanged()),
        LSUN(str(database), 6, CropThenResize("bilinear")),
    ]
    seen = [before, *(source.identity for source in others)]
    for _ in range(5):  # an image in another's place; the first writes take new pages, the later ones those set free
        write(copy, {b"0" * 40: encoded(1)})
        seen.append(LSUN(str(copy), 6).identity)
    write(copy, {b"f" * 40: encoded(1)})
    seen.append(LSUN(str(copy), 6).identity)
    assert len({json.dumps(identity) for identity in seen}) == len(seen) == 10


def test_a_missing_database_says_what_belongs_there(tmp_path: Path) -> None:
    with pytest.raises(
        FileNotFoundError, match=r"data\.mdb in it, from https://github\.com/fyu/lsun \(nothing is downl"
    ):
        LSUN(str(tmp_path), 6)


def test_a_file_that_is_no_database_is_refused(tmp_path: Path) -> None:
    (tmp_path / "data.mdb").write_bytes(b"PK\x03\x04" * 4096)
    with pytest.raises(ValueError, match="cannot open the LMDB at"):
        LSUN(str(tmp_path), 6)


def test_an_empty_database_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "empty", {})
    with pytest.raises(ValueError, match="is empty"):
        LSUN(str(tmp_path / "empty"), 6)


def test_an_unreadable_image_is_named_by_its_key_and_the_database_can_be_read_again(database: Path) -> None:
    write(database, {b"1" * 40: b"\xff\xd8no jpeg"})
    for _ in range(2):
        with pytest.raises(ValueError, match=f"church_outdoor_train_lmdb: b'{'1' * 40}' cannot be read as an image"):
            list(LSUN(str(database), 6).batches(2))


def test_whoever_stops_early_leaves_the_database_closed(database: Path) -> None:
    source = LSUN(str(database), 6)
    batches = source.batches(2)
    next(batches)
    del batches
    assert len(list(source.batches(5))) == 1


def test_a_batch_without_images_is_refused_at_once(database: Path) -> None:
    with pytest.raises(ValueError, match="at least one image, got 0"):
        LSUN(str(database), 6).batches(0)

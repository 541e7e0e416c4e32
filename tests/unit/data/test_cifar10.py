"""CIFAR-10's two archives, in small; and a pickle that tries to run something."""

import hashlib
import json
import os
import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torchvision import datasets

from tfmq_exp.data import cifar10
from tfmq_exp.data.cifar10 import BINARY, CIFAR10, PYTHON

PER_FILE = 4


def rows(i: int) -> np.ndarray:
    return np.random.default_rng(i).integers(0, 256, (PER_FILE, 3072), dtype=np.uint8)


def text(value: bytes) -> bytes:
    """A string as Python 2 pickles it: BINSTRING."""
    return b"T" + struct.pack("<i", len(value)) + value


def python2(data: np.ndarray, labels: list[int], extra: bytes = b"") -> bytes:
    """A batch as Python 2 with NumPy 1 pickles it by protocol 2, instruction by instruction."""
    kind = b"cnumpy\ndtype\n" + text(b"u1") + b"K\x00K\x01\x87R(K\x03" + text(b"|") + b"NNNJ\xff\xff\xff\xff"
    kind += b"J\xff\xff\xff\xffK\x00tb"
    empty = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85" + text(b"b") + b"\x87R"
    shape = b"".join(b"J" + struct.pack("<i", n) for n in data.shape)
    state = b"(K\x01(" + shape + b"t" + kind + b"\x89" + text(data.tobytes()) + b"tb"
    numbers = b"](" + b"".join(b"J" + struct.pack("<i", n) for n in labels) + b"e"
    items = text(b"data") + empty + state + text(b"labels") + numbers + text(b"batch_label") + text(b"batch 1 of 5")
    return b"\x80\x02}(" + items + extra + b"u."


@pytest.fixture
def published(monkeypatch: pytest.MonkeyPatch) -> dict[str, bytes]:
    """The python version's files, and md5 sums that are theirs."""
    files = {f"data_batch_{i}": python2(rows(i), [i, 0, 9, i]) for i in range(1, 6)}
    monkeypatch.setattr(cifar10, "PER_FILE", PER_FILE)
    sums = {name: hashlib.md5(content, usedforsecurity=False).hexdigest() for name, content in files.items()}
    monkeypatch.setattr(cifar10, "PYTHON_FILES", sums)
    return files


@pytest.fixture
def python(tmp_path: Path, published: dict[str, bytes]) -> Path:
    (tmp_path / PYTHON).mkdir()
    for name, content in published.items():
        (tmp_path / PYTHON / name).write_bytes(content)
    return tmp_path


@pytest.fixture
def binary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(cifar10, "PER_FILE", PER_FILE)
    (tmp_path / BINARY).mkdir()
    for i in range(1, 6):
        content = b"".join(bytes([label]) + row.tobytes() for label, row in zip([i, 0, 9, i], rows(i), strict=True))
        (tmp_path / BINARY / f"data_batch_{i}.bin").write_bytes(content)
    return tmp_path


def expected() -> Tensor:
    """Image by image: three planes of 32 rows."""
    planes = [
        [row[1024 * c : 1024 * (c + 1)].reshape(32, 32) for c in range(3)] for i in range(1, 6) for row in rows(i)
    ]
    return torch.from_numpy(np.array(planes))


@pytest.mark.parametrize("version", ["python", "binary"])
def test_both_versions_give_all_images_in_order(version: str, request: pytest.FixtureRequest) -> None:
    source = CIFAR10(str(request.getfixturevalue(version)))
    assert (len(source), source.shape) == (20, (3, 32, 32))
    for size in (1, 3, 20, 100):
        parts = list(source.batches(size))
        assert len(parts[0]) == min(size, 20)
        assert torch.cat(parts).equal(expected())


def test_the_pickles_of_these_tests_are_what_numpy_reads() -> None:
    batch = pickle.loads(python2(rows(1), [1, 2, 3, 4]), encoding="bytes")
    assert np.array_equal(batch[b"data"], rows(1))
    assert batch[b"labels"] == [1, 2, 3, 4]


@pytest.fixture
def read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[bytes], np.ndarray]:
    """Reads the content of a file whose md5 is the published one."""

    def read(content: bytes) -> np.ndarray:
        (tmp_path / "batch").write_bytes(content)
        sums = {"batch": hashlib.md5(content, usedforsecurity=False).hexdigest()}
        monkeypatch.setattr(cifar10, "PYTHON_FILES", sums)
        monkeypatch.setattr(cifar10, "PER_FILE", PER_FILE)
        return cifar10.read_images(tmp_path / "batch")

    return read


@pytest.mark.parametrize("protocol", [3, 4])
@pytest.mark.parametrize("order", ["C", "F"])
def test_arrays_as_numpy_pickles_them_today_are_read(protocol: int, order: Any, read: Callable[..., Any]) -> None:
    images = read(pickle.dumps({b"data": np.array(rows(1), order=order), b"labels": [1, 2, 3, 4]}, protocol=protocol))
    assert np.array_equal(images.reshape(PER_FILE, -1), rows(1))


def test_the_binary_version_is_preferred(python: Path, binary: Path) -> None:
    for file in (python / PYTHON).iterdir():
        file.write_bytes(b"no batch")
    assert torch.cat(list(CIFAR10(str(binary)).batches(7))).equal(expected())


def test_identity_is_the_content_of_the_files(binary: Path) -> None:
    before = CIFAR10(str(binary)).identity
    assert json.loads(json.dumps(before)) == before
    files = {f"data_batch_{i}.bin": binary / BINARY / f"data_batch_{i}.bin" for i in range(1, 6)}
    assert before["files"] == {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in files.items()}
    path = files["data_batch_5.bin"]
    state, content = path.stat(), bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))  # as many bytes, at the same time
    assert CIFAR10(str(binary)).identity != before


def test_sums_are_those_that_torchvision_checks() -> None:
    assert list(cifar10.PYTHON_FILES.items()) == [tuple(pair) for pair in datasets.CIFAR10.train_list]
    assert datasets.CIFAR10.base_folder == cifar10.PYTHON

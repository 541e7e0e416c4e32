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


class Evil:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.marker}",)


def attacks(marker: Path) -> dict[str, bytes]:
    command = b"touch " + bytes(marker)
    hidden = text(b"filenames") + b"](cos\nsystem\n" + text(command) + b"\x85Re"
    good = python2(rows(1), [1, 2, 3, 4])
    return {
        "root": pickle.dumps(Evil(marker), protocol=2),
        "label": pickle.dumps({b"data": rows(1), b"labels": [Evil(marker)]}, protocol=3),
        "behind the labels": python2(rows(1), [1, 2, 3, 4], hidden),
        "instead of the array": good.replace(b"cnumpy.core.multiarray\n_reconstruct\n", b"cos\nsystem\n"),
        "through numpy": good.replace(b"cnumpy\nndarray\n", b"cnumpy\nsave\n"),
        "protocol 0": b"cos\nsystem\n(S'" + command + b"'\ntR.",
        "INST": b"(S'" + command + b"'\nios\nsystem\n.",
        "OBJ": b"(cos\nsystem\nS'" + command + b"'\no.",
        "STACK_GLOBAL": b"\x80\x04\x8c\x08builtins\x8c\x04exec\x93.",
    }


@pytest.mark.parametrize("place", attacks(Path("marker")))
def test_code_in_a_batch_is_refused_and_does_not_run(place: str, tmp_path: Path, read: Callable[..., Any]) -> None:
    marker = tmp_path / "marker"
    with pytest.raises(ValueError, match=r"batch is no batch of CIFAR-10 \(\w+: refuses to load '\w+\.\w+'"):
        read(attacks(marker)[place])
    assert not marker.exists()


@pytest.mark.parametrize("place", ["root", "behind the labels"])
def test_the_attacks_do_work_elsewhere(place: str, tmp_path: Path) -> None:
    pickle.loads(attacks(tmp_path / "marker")[place], encoding="bytes")
    assert (tmp_path / "marker").exists()


def test_a_batch_with_code_in_it_is_refused_by_the_source_too(python: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    marker, path = python / "marker", python / PYTHON / "data_batch_3"
    content = attacks(marker)["behind the labels"]
    path.write_bytes(content)
    with pytest.raises(
        ValueError, match=r"data_batch_3 is damaged or not the published file: its md5 is \w+, expected \w+"
    ):
        CIFAR10(str(python)).batches(5)
    sums = cifar10.PYTHON_FILES | {"data_batch_3": hashlib.md5(content, usedforsecurity=False).hexdigest()}
    monkeypatch.setattr(cifar10, "PYTHON_FILES", sums)
    with pytest.raises(ValueError, match=r"data_batch_3 is no batch of CIFAR-10 \(\w+: refuses to load 'os\.system'"):
        CIFAR10(str(python)).batches(5)
    assert not marker.exists()


def test_a_pickle_cannot_change_what_the_next_one_is_given(read: Callable[..., Any]) -> None:
    with pytest.raises(ValueError, match="no batch"):
        read(b"\x80\x02cnumpy\ndtype\nN}(X\x08\x00\x00\x00__init__Nu\x86b.")
    assert np.array_equal(read(python2(rows(1), [1, 2, 3, 4])).reshape(PER_FILE, -1), rows(1))


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "EOFError"),
        (b"no pickle", "UnpicklingError"),
        (python2(rows(1), [1])[:-9], "EOFError|UnpicklingError"),
        (pickle.dumps({b"labels": [1]}), "KeyError"),
        (pickle.dumps([1]), "TypeError"),
        (pickle.dumps({b"data": [1], b"labels": [1]}), "AttributeError"),
        (pickle.dumps({b"data": rows(1).astype(np.float32), b"labels": [1]}, protocol=3), "are of type float32"),
        (python2(rows(1), [1]).replace(struct.pack("<i", 3072), struct.pack("<i", 3073), 1), "size"),
    ],
)
def test_damaged_batches_are_refused(content: bytes, reason: str, read: Callable[..., Any]) -> None:
    with pytest.raises(ValueError, match=rf"batch is no batch of CIFAR-10 \(.*({reason})"):
        read(content)


@pytest.mark.parametrize(
    ("data", "labels", "message"),
    [
        (rows(1)[:3], [1, 2, 3], r"holds images \(3, 3072\) and 3 labels, expected \(4, 3072\) and 4"),
        (rows(1), [1, 2, 3], r"and 3 labels"),
        (rows(1)[:, :1024], [1, 2, 3, 4], r"holds images \(4, 1024\)"),
        (rows(1), [1, 2, 3, 10], "has labels from 1 to 10, expected 0 to 9"),
        (rows(1), [-1, 2, 3, 4], "has labels from -1 to 4"),
    ],
)
def test_batches_of_another_set_are_refused(
    data: np.ndarray, labels: list[int], message: str, python: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = python2(data, labels)
    (python / PYTHON / "data_batch_1").write_bytes(content)
    sums = cifar10.PYTHON_FILES | {"data_batch_1": hashlib.md5(content, usedforsecurity=False).hexdigest()}
    monkeypatch.setattr(cifar10, "PYTHON_FILES", sums)
    with pytest.raises(ValueError, match=message):
        CIFAR10(str(python)).batches(5)


def test_binary_files_of_another_length_or_with_other_labels_are_refused(binary: Path) -> None:
    path = binary / BINARY / "data_batch_2.bin"
    content = path.read_bytes()
    path.write_bytes(content[:-1])
    with pytest.raises(ValueError, match=r"data_batch_2\.bin has 12291 bytes, expected 12292: it is truncated"):
        CIFAR10(str(binary)).batches(5)
    path.write_bytes(b"\x0a" + content[1:])
    with pytest.raises(ValueError, match="has labels from 0 to 10"):
        CIFAR10(str(binary)).batches(5)


def test_what_is_missing_is_named(tmp_path: Path, binary: Path) -> None:
    with pytest.raises(
        FileNotFoundError, match=r"expected cifar-10-batches-bin/ or .*cs\.toronto\.edu.*nothing is downl"
    ):
        CIFAR10(str(tmp_path / "nowhere"))
    (binary / BINARY / "data_batch_4.bin").unlink()
    with pytest.raises(FileNotFoundError, match=r"lacks data_batch_4\.bin"):
        CIFAR10(str(binary))


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


def test_a_batch_without_images_is_refused(binary: Path) -> None:
    with pytest.raises(ValueError, match="at least one image, got 0"):
        CIFAR10(str(binary)).batches(0)

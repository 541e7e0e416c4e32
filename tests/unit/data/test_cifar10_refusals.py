"""Batches of CIFAR-10 with code in them, damaged, or of another set."""

import hashlib
import os
import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.unit.data.test_cifar10 import PER_FILE, binary, published, python, python2, read, rows, text  # noqa: F401 - fixtures
from tfmq_exp.data import cifar10
from tfmq_exp.data.cifar10 import BINARY, CIFAR10, PYTHON


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


def test_a_batch_without_images_is_refused(binary: Path) -> None:
    with pytest.raises(ValueError, match="at least one image, got 0"):
        CIFAR10(str(binary)).batches(0)

"""Tensors with a JSON header: what is written is read, equal contents are equal files, and anything else is refused."""

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tfmq_exp.core.tensor_file import DTYPES, TensorFile, read_tensor_file, write_tensor_file

pytestmark = pytest.mark.bad_input

TENSORS = {"b": torch.arange(3), "a": torch.ones(2, 2, dtype=torch.float16)}


def test_what_is_written_is_read(tmp_path: Path) -> None:
    header = {"shape": [3, 8, 8], "name": "digits", "more": {"z": None, "a": 1.5}}
    write_tensor_file(tmp_path / "a", TENSORS, header)
    write_tensor_file(tmp_path / "b", dict(reversed(TENSORS.items())), dict(reversed(header.items())))
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    found, tensors = read_tensor_file(tmp_path / "a")
    assert found == header
    assert all(torch.equal(tensors[name], value) for name, value in TENSORS.items())


@pytest.mark.parametrize("header", ["[]", "3", "{", "[" * 100_000])
def test_headers_that_are_no_objects(header: str, tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "a", {"header": header})
    with pytest.raises(ValueError, match=r"^.*/a is (no file of this program|not readable)"):
        read_tensor_file(tmp_path / "a")


def test_other_files(tmp_path: Path) -> None:
    write_tensor_file(tmp_path / "a", TENSORS, {})
    content = (tmp_path / "a").read_bytes()
    for damaged, words in (
        (content[:-3], "is truncated: it begins as safetensors of 184 bytes and has 181"),
        (b"version https://git-lfs", "git lfs pull"),
        (b"", "is empty"),
    ):
        (tmp_path / "a").write_bytes(damaged)
        with pytest.raises(ValueError, match=words):
            read_tensor_file(tmp_path / "a")


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=str)
def test_files_are_those_of_safetensors(dtype: torch.dtype, tmp_path: Path) -> None:
    shapes = {"a": (3, 2), "b": (), 'é"\n': (0, 4), "B": (5,)}
    tensors = {
        name: torch.arange(max(1, math.prod(s))).to(dtype)[: math.prod(s)].reshape(s) for name, s in shapes.items()
    }
    tensors |= TENSORS | {"odd": torch.ones(3, dtype=torch.bool), "turned": torch.arange(6.0).reshape(2, 3).T}
    write_tensor_file(tmp_path / "own", tensors, {"a": ["é", 1]})
    plain = {name: x.contiguous() for name, x in tensors.items()}
    save_file(plain, tmp_path / "library", {"header": json.dumps({"a": ["é", 1]})})
    assert (tmp_path / "own").read_bytes() == (tmp_path / "library").read_bytes()


def test_tensors_are_read_one_by_one(tmp_path: Path) -> None:
    write_tensor_file(tmp_path / "a", TENSORS, {"x": 1})
    file = TensorFile(tmp_path / "a")
    assert file.header == {"x": 1}
    assert {name: (x.shape, x.dtype) for name, x in file.outlines.items()} == {
        name: (x.shape, x.dtype) for name, x in TENSORS.items()
    }
    assert all(torch.equal(file[name], value) for name, value in TENSORS.items())
    write_tensor_file(tmp_path / "b", file, file.header)
    assert (tmp_path / "b").read_bytes() == (tmp_path / "a").read_bytes()
    with pytest.raises(KeyError):
        file["c"]

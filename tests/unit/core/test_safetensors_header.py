"""Damaged headers of safetensors get one sentence that names the file, whoever reads it."""

import json
import struct
from collections.abc import Callable
from pathlib import Path

import pytest

from tfmq_exp.core.safetensors_header import header_fault
from tfmq_exp.core.tensor_file import read_tensor_file
from tfmq_exp.denoisers.loading.checkpoint import read_tensors
from tfmq_exp.denoisers.loading.sharded_weights import tensor_names

pytestmark = pytest.mark.bad_input
ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
READERS = {"artefact": read_tensor_file, "checkpoint": read_tensors, "shard": tensor_names}


def entry(**changes: object) -> bytes:
    return json.dumps({"a": ENTRY | changes}).encode()


FAULTS: dict[str, tuple[bytes, int | None, str]] = {
    "too long for any": (entry(), 10**9, "header says that it has 1000000000 bytes"),
    "longer than the file": (entry(), 10**4, "is truncated: it begins as safetensors of at least 10008 bytes"),
    "not JSON": (b'{"a": nonsense', None, "its header is not JSON"),
    "not text": (b'{"\xff\xfe": 1}', None, "its header is not JSON"),
    "beyond the file": (entry(data_offsets=[0, 800], shape=[200]), None, "is truncated: it begins as safetensors of"),
    "backwards": (entry(data_offsets=[8, 0]), None, "no dtype, shape and place for 'a'"),
    "a place of one number": (entry(data_offsets=[8]), None, "no dtype, shape and place for 'a'"),
    "a negative shape": (entry(shape=[-2]), None, "no dtype, shape and place for 'a'"),
    "no shape": (b'{"a": 3}', None, "no dtype, shape and place for 'a'"),
}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("fault", FAULTS)
def test_the_message_names_the_file_and_the_fault(fault: str, reader: str, tmp_path: Path) -> None:
    header, length, message = FAULTS[fault]
    path = tmp_path / "model.safetensors"
    path.write_bytes(struct.pack("<Q", len(header) if length is None else length) + header + bytes(8))
    read: Callable[[Path], object] = READERS[reader]
    with pytest.raises(ValueError, match=message) as caught:
        read(path)
    assert str(caught.value).startswith(f"{path}")
    assert "\n" not in str(caught.value)


def test_a_header_without_a_fault(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(struct.pack("<Q", len(entry())) + entry() + bytes(8))
    assert header_fault(path) is None
    assert list(read_tensors(path)) == ["a"]

"""Small pickles that would crash the reader, fill the memory or run for ever are refused at once."""

import pickle
import resource
import struct
import time
import zipfile
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.checkpoints import tensor_names
from tfmq_exp.denoisers.loading.checkpoint import read_tensors
from tfmq_exp.denoisers.loading.torch_pickle import MOST_INSTRUCTIONS

pytestmark = pytest.mark.bad_input

SECONDS, MEMORY = 2.0, 200 * 2**20
DEEP = 200_000


@contextmanager
def bounded() -> Iterator[None]:
    """With little more memory than there is in use, and in little time."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    start = time.process_time()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
    assert time.process_time() - start < SECONDS


def doubled(levels: int, start: bytes = b"K\x01") -> bytes:
    """A tuple of twice a tuple of twice a tuple ...: 2^levels parts."""
    return start + b"".join(b"2\x86" for _ in range(levels))


def doubled_through_memo(levels: int) -> bytes:
    return b"K\x01q\x00" + b"h\x00\x86q\x00" * levels


def nested(levels: int) -> bytes:
    return b"K\x01" + b"\x85" * levels


def tuples(count: int) -> bytes:
    return b"(" + b"".join(b"J" + struct.pack("<i", i) + b"\x85N" for i in range(count)) + b"u"


def large_integers(count: int) -> bytes:
    """Whose hashes are all 0."""
    numbers = ((i + 1) * (2**61 - 1) for i in range(count))
    return b"(" + b"".join(b"\x8a\x0a" + number.to_bytes(10, "little") + b"N" for number in numbers) + b"u"


REBUILD = b"ctorch._utils\n_rebuild_tensor_v2\n"
ORDERED = b"ccollections\nOrderedDict\n"
SIZE = b"ctorch\nSize\n"

HOSTILE: dict[str, bytes] = {
    "memo of 2^31 places": b"}r\xff\xff\xff\x7f.",
    "memo of 2^30 places": b"}r\x00\x00\x00\x40.",
    "memo of 10^18 places by text": b"}p1000000000000000000\n.",
    "memo of a negative place": b"}p-1\n.",
    "memo that grows by steps": b"}" + b"".join(b"r" + struct.pack("<I", 10**k) for k in range(1, 10)) + b".",
    "key of deep tuples": b"}" + nested(DEEP) + b"Ns.",
    "key of deep tuples in a list of items": b"}(" + nested(DEEP) + b"Nu.",
    "key of deep tuples by DICT": b"(" + nested(DEEP) + b"Nd.",
    "deep tuple in a set": b"\x8f(" + nested(DEEP) + b"\x90.",
    "deep tuple in a frozenset": b"(" + nested(DEEP) + b"\x91.",
    "deep frozensets": b"(" * DEEP + b"\x91" * DEEP + b".",
    "key of 2^45 parts": b"}" + doubled(45) + b"Ns.",
    "key of 2^45 parts through the memo": b"}" + doubled_through_memo(45) + b"Ns.",
    "key of 2^45 parts in a set": b"\x8f(" + doubled(45) + b"\x90.",
    "key of 2^45 parts in a frozenset": b"(" + doubled(45) + b"\x91.",
    "key of 2^45 parts inside a list of pairs": ORDERED + b"(](" + doubled(45) + b"N\x86etR.",
    "key of 2^45 parts hidden in a size": b"}" + SIZE + b"(](" + doubled(45) + b"etRNs.",
    "two equal keys of 2^45 parts": b"}(" + doubled(45) + b"N" + doubled(45) + b"Nu.",
    "key of a tensor of tuples": b"}" + REBUILD + b"(" + doubled(45) + b"tRNs.",
    "2^100000 parts": b"}" + doubled(100_000) + b"Ns.",
    "many keys of tuples": b"}" + tuples(100_000) + b".",
    "keys whose hashes are equal": b"}" + large_integers(50_000) + b".",
    "bytes longer than the file": b"\x8e" + struct.pack("<Q", 2**45) + b"x.",
    "bytes longer than any memory": b"\x8e" + struct.pack("<Q", 2**62) + b"x.",
    "bytes of 2 GB": b"B\xff\xff\xff\x7fx.",
    "bytearray longer than the file": b"\x96" + struct.pack("<Q", 2**36) + b"x.",
    "text longer than the file": b"\x8d" + struct.pack("<Q", 2**45) + b"x.",
    "frame longer than the file": b"\x95" + struct.pack("<Q", 2**45) + b"N.",
    "number longer than the file": b"\x8b\xff\xff\xff\x7f\x01.",
    "number of 8 million bits": b"\x8b" + struct.pack("<i", 2**20) + b"\x7f" * 2**20 + b".",
    "number of a million digits": b"L" + b"9" * 10**6 + b"L\n.",
    "number of 10^6 digits as an INT": b"I" + b"9" * 10**6 + b"\n.",
    "more instructions than any checkpoint": b"(" + b"N0" * MOST_INSTRUCTIONS + b".",
    "a stack that grows": b"N" * (MOST_INSTRUCTIONS + 10) + b".",
    "marks upon marks": b"(" * (MOST_INSTRUCTIONS + 10) + b".",
    "more bytes than any checkpoint": b"B" + struct.pack("<I", 2**26) + bytes(2**26) + b".",
    "an underflow": b"\x86.",
    "an underflow through a mark": b"N(\x86.",
    "a memo that was never filled": b"h\x05.",
    "persistent id of a number": b"K\x01Q.",
    "persistent id of text": b"Pstorage\n.",
    "persistent id of nothing": b")Q.",
    "persistent id of deep lists": b"]" + b"]a" * 10 + b"Q.",
    "setting attributes of a number": b"K\x01}b.",
    "setting attributes by odd names": ORDERED + b")R(N}(K\x01K\x02utb.",
    "calling what a call returned": b"cargparse\nNamespace\n)R)R)R.",
}


def written(path: Path, code: bytes, form: str) -> Path:
    """A file whose state is described by `code`, in each of the places where pickles are read."""
    legacy = b"".join(pickle.dumps(part, 2) for part in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}))
    if form == "zip":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("a/data.pkl", b"\x80\x04" + code)
    elif form == "root":
        path.write_bytes(legacy + b"\x80\x04" + code + pickle.dumps([], 2))
    else:
        path.write_bytes(legacy + pickle.dumps({"a": 1}, 2) + b"\x80\x04" + code)
    return path


@pytest.mark.parametrize("form", ["zip", "root"])
@pytest.mark.parametrize("name", HOSTILE)
def test_refused_at_once(name: str, form: str, tmp_path: Path) -> None:
    path = written(tmp_path / "a.ckpt", HOSTILE[name], form)
    with bounded(), pytest.raises(ValueError, match=r"\S") as caught:
        tensor_names(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert "\n" not in message
    assert len(message) < 600
    assert "MemoryError" not in message
    assert "RecursionError" not in message


@pytest.mark.parametrize("key", [doubled(45), nested(DEEP)], ids=["wide", "deep"])
def test_keys_of_storages_are_text(key: bytes, tmp_path: Path) -> None:
    """The list of keys of an old file is looked up, too."""
    with bounded(), pytest.raises(ValueError, match="keys of its storages are no text"):
        tensor_names(written(tmp_path / "a.ckpt", b"](" + key + b"e.", "keys"))


@pytest.mark.parametrize(
    "value",
    [
        {"deep": (lambda x: [x := [x] for _ in range(150)][-1])([])},
        {
            ("train", "loss"): 1.0,
            (0, 1): 2,
            frozenset({1}): 3,
            2**50: 4,
            "s": {1, 2, ("a", 2)},
            None: 5,
            1.5: 6,
            b"x": 7,
        },
        {"rng": {"state": 2**127 + 1, "inc": 2**127 + 3}, "seen": set(range(1000))},
        {"once": ["the same text"] * 10_000, "table": {(i, j): 0 for i in range(50) for j in range(50)}},
        {i: {"step": 3, "exp_avg": None} for i in range(3000)},
        OrderedDict((f"name {i}", (i, [i], {i: i})) for i in range(3000)),
    ],
)
@pytest.mark.parametrize("is_zip", [True, False])
@pytest.mark.parametrize("protocol", [2, 4])
def test_what_training_programs_keep_is_read(value: Any, is_zip: bool, protocol: int, tmp_path: Path) -> None:
    state = {"state_dict": {"a": torch.arange(3.0)}, "more": value}
    torch.save(state, tmp_path / "a.ckpt", pickle_protocol=protocol, _use_new_zipfile_serialization=is_zip)
    assert torch.equal(read_tensors(tmp_path / "a.ckpt")["a"], torch.arange(3.0))


def test_as_many_tensors_as_the_largest_models_have_are_read_soon(tmp_path: Path) -> None:
    state = {f"model.diffusion_model.input_blocks.{i}.weight": torch.zeros(1) for i in range(3000)}
    torch.save({"state_dict": state}, tmp_path / "a.ckpt")
    start = time.process_time()
    assert len(tensor_names(tmp_path / "a.ckpt")) == 3000
    assert time.process_time() - start < SECONDS


def stored(path: Path, names: list[str], content: bytes = b"x" * 4) -> Path:
    """The zip file of one tensor of four bytes, with records by these names."""
    torch.save({"a": torch.zeros(1)}, path)
    with zipfile.ZipFile(path) as archive:
        old = {info.filename: archive.read(info) for info in archive.infolist()}
        data = next(name for name in old if name.endswith("/data/0"))
    with zipfile.ZipFile(path, "w") as archive:
        for name, value in old.items():
            if name != data:
                archive.writestr(name, value)
        for name in names:
            archive.writestr(name.format(data=data), content)
    return path


def test_records_that_share_a_name_are_refused(tmp_path: Path) -> None:
    assert tensor_names(stored(tmp_path / "a.ckpt", ["{data}"])) == ["a"]
    with pytest.warns(UserWarning, match="Duplicate"):
        path = stored(tmp_path / "a.ckpt", ["{data}", "{data}"])
    with pytest.raises(ValueError, match="records share a name"):
        tensor_names(path)


@pytest.mark.parametrize("claim", [5, 2**31, 2**32 - 2])
def test_records_longer_than_the_file_are_refused(claim: int, tmp_path: Path) -> None:
    path = stored(tmp_path / "a.ckpt", ["{data}"])
    content = bytearray(path.read_bytes())
    place = content.rindex(b"PK\x01\x02")
    struct.pack_into("<II", content, place + 20, claim, claim)
    path.write_bytes(content)
    with bounded(), pytest.raises(ValueError, match=r"damaged"):
        read_tensors(path)


def test_records_that_lie_over_each_other_are_refused(tmp_path: Path) -> None:
    """A hundred names for the same bytes, in the directory of the file alone."""
    path = stored(tmp_path / "a.ckpt", ["{data}"], b"x" * 4000)
    with zipfile.ZipFile(path, "a") as archive:
        info = archive.infolist()[-1]
        for i in range(100):
            copy = zipfile.ZipInfo(f"{info.filename}{i}")
            copy.file_size, copy.compress_size, copy.header_offset = (
                info.file_size,
                info.compress_size,
                info.header_offset,
            )
            copy.CRC = info.CRC
            archive.filelist.append(copy)
            archive.NameToInfo[copy.filename] = copy
        archive._didModify = True  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match="together longer than the file"):
        tensor_names(path)


@pytest.mark.parametrize("is_zip", [True, False])
def test_a_number_does_not_stand_for_a_tensor_of_any_size(is_zip: bool, tmp_path: Path) -> None:
    """Copies of such a tensor fill the memory."""
    for size in ((2**20, 2**20), (2**40,), (2**31, 2**31, 2**31)):
        tensor = torch.zeros(1).expand(size) if len(size) < 3 else torch.zeros(1).as_strided((4, 4), (0, 0))
        torch.save({"a": tensor}, tmp_path / "a.ckpt", _use_new_zipfile_serialization=is_zip)
        if len(size) < 3:
            with bounded(), pytest.raises(ValueError, match="'a' does not lie within its storage"):
                read_tensors(tmp_path / "a.ckpt")
        else:
            assert read_tensors(tmp_path / "a.ckpt")["a"].shape == (4, 4)

"""Keys depend on what matters and on nothing else."""

import errno
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tfmq_exp.core.files import hash_path, intact, read_record, write_atomically, write_checked, write_record
from tfmq_exp.pipeline.store import DamagedEntry, Entry, Store, canonical, code_of, key_of
from tfmq_exp.quant.spec import QuantSpec

pytestmark = pytest.mark.bad_input


@dataclass(frozen=True)
class Choice:
    bits: int
    name: str = "x"


@dataclass(frozen=True)
class OtherChoice:
    bits: int
    name: str = "x"


def test_the_order_of_keys_does_not_matter() -> None:
    assert key_of("s", {"a": 1, "b": {"c": 2, "d": 3}}) == key_of("s", {"b": {"d": 3, "c": 2}, "a": 1})


@pytest.mark.parametrize("inputs", [{"a": 2}, {"a": 1, "b": None}, {"a": "1"}, {"a": [1]}, {}])
def test_any_change_makes_another_key(inputs: dict[str, object]) -> None:
    assert key_of("s", inputs) != key_of("s", {"a": 1})
    assert key_of("t", {"a": 1}) != key_of("s", {"a": 1})


def test_records_are_described_with_their_class() -> None:
    assert canonical({"m": QuantSpec(4)}) == {"m": {"class": "QuantSpec", "bits": 4, "scheme": "affine", "axis": None}}


def test_a_class_that_is_not_the_programs_is_described_with_its_code() -> None:
    described = canonical(Choice(4))
    code = described.pop("code")
    assert described == {"class": "Choice", "module": __name__, "bits": 4, "name": "x"}
    assert code == code_of(__name__.split(".")[0])
    assert canonical(Choice(5))["code"] == code
    assert code_of("torch") is None
    assert canonical(Choice(4)) != canonical(OtherChoice(4))
    with pytest.raises(TypeError, match="function"):
        canonical({"f": lambda: None, "g": 1}["f"])


def test_a_finished_entry_is_not_computed_again(tmp_path: Path) -> None:
    store = Store(tmp_path)
    calls: list[Path] = []

    def compute(folder: Path) -> None:
        calls.append(folder)
        (folder / "result").write_text("r")

    assert store.get_or_compute(store.entry("s", {"a": 1}), compute)
    assert not store.get_or_compute(store.entry("s", {"a": 1}), compute)
    assert store.get_or_compute(store.entry("s", {"a": 2}), compute)
    assert len(calls) == 2


def test_a_failed_computation_leaves_the_entry_unfinished(tmp_path: Path) -> None:
    store = Store(tmp_path)
    entry = store.entry("s", {})

    def fail(folder: Path) -> None:
        (folder / "half").write_text("")
        raise RuntimeError("no")

    with pytest.raises(RuntimeError):
        store.get_or_compute(entry, fail)
    assert not entry.done
    assert store.get_or_compute(entry, lambda folder: None)


def test_a_write_that_fails_leaves_nothing(tmp_path: Path) -> None:
    def fail(path: Path) -> None:
        path.write_text("half")
        raise OSError("disk")

    (tmp_path / "file").write_text("old")
    with pytest.raises(OSError, match="disk"):
        write_atomically(tmp_path / "file", fail)
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_text() == "old"


def test_a_write_that_finds_no_room_names_the_file(tmp_path: Path) -> None:
    def full(_: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match=r"No space left on device: '.*result'"):
        write_atomically(tmp_path / "result", full)
    limit = "Error while serializing: I/O error: File too large (os error 27)"
    with pytest.raises(OSError, match=r"result could not be written.*File too large"):
        write_atomically(tmp_path / "result", lambda _: (_ for _ in ()).throw(RuntimeError(limit)))


def one_of_each_byte(content: bytes) -> range:
    """Bits of a file, another one in each byte."""
    return range(0, 8 * len(content), 7)


def turned(content: bytes, bit: int) -> bytes:
    changed = bytearray(content)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


def test_no_bit_of_a_finished_entry_turns_unseen(tmp_path: Path) -> None:
    store = Store(tmp_path)
    entry = store.entry("s", {"a": 1.5})
    store.get_or_compute(entry, lambda folder: store.write_json(folder / "result.json", {"x": [1, 2.5]}), lambda: 12.5)
    assert entry.seconds == 12.5
    files = sorted(entry.path.iterdir())
    assert [path.name for path in files] == ["inputs.json", "manifest.json", "result.json"]
    for path in files:
        content = path.read_bytes()
        for bit in one_of_each_byte(content):
            path.write_bytes(turned(content, bit))
            with pytest.raises(DamagedEntry, match=path.name):
                entry.verify()
        path.write_bytes(content)
    entry.verify()
    files[0].unlink()
    assert entry.done
    assert not entry.complete
    with pytest.raises(DamagedEntry, match="inputs"):
        store.get_or_compute(entry, lambda folder: None)


def test_a_record_says_when_it_is_not_what_was_written(tmp_path: Path) -> None:
    path, data = tmp_path / "record.json", {"rows": [{"fid": 3.98, "é": None}, {"fid": 1e-9}], "b": True}
    write_record(path, data)
    assert read_record(path) == data
    content = path.read_bytes()
    for bit in one_of_each_byte(content):
        path.write_bytes(turned(content, bit))
        with suppress(ValueError):  # unless the key of the hash itself was hit
            assert {key: value for key, value in read_record(path).items() if key in data} == data
    path.write_bytes(content.replace(b"3.98", b"3.97"))
    with pytest.raises(ValueError, match=r"record\.json is damaged"):
        read_record(path)
    path.write_text("[]")
    with pytest.raises(ValueError, match=r"record\.json holds no JSON object"):
        read_record(path)


def test_a_part_is_used_only_where_it_is_what_was_written(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    part = tmp_path / "part"
    assert not intact(part)
    assert not caplog.records
    write_checked(part, lambda path: path.write_bytes(b"content"))
    assert intact(part)
    for damage in (b"Content", b"", b"conten", b"content more"):
        part.write_bytes(damage)
        assert not intact(part)
        assert str(part) in caplog.text
        caplog.clear()
    part.write_bytes(b"content")
    for damage in (b"", b"0" * 64, b"\xff" * 64):
        hash_path(part).write_bytes(damage)
        assert not intact(part)
    hash_path(part).unlink()
    assert not intact(part), "written by nobody knows whom"


def test_a_part_that_turns_after_it_was_written_is_not_sealed(tmp_path: Path) -> None:
    store = Store(tmp_path)
    entry = store.entry("s", {})

    def compute(folder: Path, damage: bytes = b"") -> None:
        if not intact(folder / "part"):
            store.write(folder / "part", lambda path: path.write_bytes(b"content"))
        if damage:
            (folder / "part").write_bytes(damage)

    with pytest.raises(DamagedEntry, match="part has changed"):
        store.get_or_compute(entry, lambda folder: compute(folder, b"Content"))
    assert not entry.done
    (entry.path / "other.123.partial").write_bytes(b"half")
    assert store.get_or_compute(entry, compute)
    assert (entry.path / "part").read_bytes() == b"content"
    assert {path.name for path in entry.path.iterdir()} == {"inputs.json", "manifest.json", "part"}


def test_a_read_only_store_serves_what_it_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(tmp_path)
    store.get_or_compute(store.entry("s", {}), lambda folder: None)

    def refused(*_: Any, **__: Any) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr("tfmq_exp.pipeline.store.FileLock", refused)
    monkeypatch.setattr(Path, "mkdir", refused)
    assert not store.get_or_compute(store.entry("s", {}), lambda folder: pytest.fail("it was made again"))
    with pytest.raises(OSError, match="Read-only"):
        store.get_or_compute(store.entry("s", {"other": 1}), lambda folder: None)


def test_an_entry_in_anothers_place_is_damage(tmp_path: Path) -> None:
    store = Store(tmp_path)
    one, other = store.entry("s", {"a": 1}), store.entry("s", {"a": 2})
    store.get_or_compute(one, lambda folder: None)
    one.path.rename(other.path)
    with pytest.raises(DamagedEntry, match="manifest"):
        store.get_or_compute(other, lambda folder: None)


def test_a_process_that_is_killed_after_the_manifest_leaves_no_trace(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(tmp_path)
    entry = store.entry("stage", {})

    def compute(folder: Path) -> None:
        write_checked(folder / "part", lambda path: path.write_text("a part"))

    with monkeypatch.context() as killed:
        killed.setattr(Entry, "remove_file_hashes", lambda _: None)
        store.get_or_compute(entry, compute)
    assert (entry.path / "part.sha256").is_file()
    assert not store.get_or_compute(entry, compute)
    assert {path.name for path in entry.path.iterdir()} == {"inputs.json", "manifest.json", "part"}

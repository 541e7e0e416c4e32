"""Keys depend on what matters and on nothing else."""

from dataclasses import dataclass
from pathlib import Path

import pytest

from tfmq_exp.experiment.store import Store, code_of, describe, key_of
from tfmq_exp.files import write_atomically
from tfmq_exp.quant.spec import QuantSpec


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
    assert describe({"m": QuantSpec(4)}) == {"m": {"class": "QuantSpec", "bits": 4, "scheme": "affine", "axis": None}}


def test_a_class_that_is_not_the_programs_is_described_with_its_code() -> None:
    described = describe(Choice(4))
    code = described.pop("code")
    assert described == {"class": "Choice", "module": __name__, "bits": 4, "name": "x"}
    assert code == code_of(__name__.split(".")[0])
    assert describe(Choice(5))["code"] == code
    assert code_of("torch") is None
    assert describe(Choice(4)) != describe(OtherChoice(4))
    with pytest.raises(TypeError, match="function"):
        describe({"f": lambda: None, "g": 1}["f"])


def test_a_finished_entry_is_not_computed_again(tmp_path: Path) -> None:
    store = Store(tmp_path)
    calls: list[Path] = []

    def compute(folder: Path) -> None:
        calls.append(folder)
        (folder / "result").write_text("r")

    assert store.pull(store.entry("s", {"a": 1}), compute)
    assert not store.pull(store.entry("s", {"a": 1}), compute)
    assert store.pull(store.entry("s", {"a": 2}), compute)
    assert len(calls) == 2


def test_a_failed_computation_leaves_the_entry_unfinished(tmp_path: Path) -> None:
    store = Store(tmp_path)
    entry = store.entry("s", {})

    def fail(folder: Path) -> None:
        (folder / "half").write_text("")
        raise RuntimeError("no")

    with pytest.raises(RuntimeError):
        store.pull(entry, fail)
    assert not entry.done
    assert store.pull(entry, lambda folder: None)


def test_a_write_that_fails_leaves_nothing(tmp_path: Path) -> None:
    def fail(path: Path) -> None:
        path.write_text("half")
        raise OSError("disk")

    (tmp_path / "file").write_text("old")
    with pytest.raises(OSError, match="disk"):
        write_atomically(tmp_path / "file", fail)
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_text() == "old"

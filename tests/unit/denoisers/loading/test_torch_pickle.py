"""Pickles of `torch.save` name tensors and settings; functions in them are refused by name and never run."""

import io
import os
import pickle
import re
import subprocess
import zipfile
from argparse import Namespace
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.checkpoints import FORMATS, equal, message, save
from tfmq_exp.denoisers.loading.checkpoint import read_tensors


class Evil:
    """Runs a function as soon as it is unpickled."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


def touch(marker: Path) -> str:
    return f"open({str(marker)!r}, 'w').close()"


def attacks(marker: Path) -> dict[str, Evil]:
    return {
        f"{os.system.__module__}.system": Evil(os.system, f"touch {marker}"),
        "subprocess.Popen": Evil(subprocess.Popen, ["touch", str(marker)]),
        "builtins.eval": Evil(eval, touch(marker)),
        "builtins.exec": Evil(exec, touch(marker)),
        "builtins.getattr": Evil(getattr, marker, "touch"),
        "io.open": Evil(open, str(marker), "w"),
        "pickle.loads": Evil(pickle.loads, pickle.dumps(Evil(exec, touch(marker)))),
        "pickle.Unpickler": Evil(pickle.Unpickler, io.BytesIO),
        "importlib.import_module": Evil(__import__("importlib").import_module, "this"),
        "torch.storage._load_from_bytes": Evil(torch.storage._load_from_bytes, b""),
        "torch.serialization.load": Evil(torch.load, str(marker)),
        "functools.partial": Evil(__import__("functools").partial, exec),
    }


PLACES: dict[str, Callable[[Any], Any]] = {
    "root": lambda evil: evil,
    "state_dict": lambda evil: {"state_dict": {"a": torch.ones(2), "evil": evil}},
    "optimizer_states": lambda evil: {"state_dict": {"a": torch.ones(2)}, "optimizer_states": [{"state": {0: evil}}]},
    "hyper_parameters": lambda evil: {"state_dict": {"a": torch.ones(2)}, "hyper_parameters": Namespace(x=[evil])},
}


@FORMATS
@pytest.mark.parametrize("name", attacks(Path()))
def test_functions_in_a_file_are_refused_by_name(name: str, is_zip: bool, tmp_path: Path) -> None:
    evil = attacks(tmp_path / "marker")[name]
    for place, wrap in PLACES.items():
        assert f"refuses to load '{name}'" in message(save(wrap(evil), tmp_path / f"{place}.ckpt", is_zip))
    assert not (tmp_path / "marker").exists()


@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
def test_functions_are_refused_in_every_protocol(protocol: int, tmp_path: Path) -> None:
    path = tmp_path / "evil.ckpt"
    for name, evil in attacks(tmp_path / "marker").items():
        path.write_bytes(pickle.dumps(evil, protocol=protocol))
        refusal = f"refuses to load '_?{re.escape(name)}'"  # _pickle is where pickle.loads really is
        assert re.search(refusal, message(path))
        for is_zip in (True, False):
            save([evil], path, is_zip, protocol)
            assert re.search(refusal, message(path))
    assert not (tmp_path / "marker").exists()


def test_the_attacks_do_work_elsewhere(tmp_path: Path) -> None:
    for name in ("builtins.exec", "builtins.eval", "pickle.loads"):
        pickle.loads(pickle.dumps(attacks(tmp_path / name)[name]))
        assert (tmp_path / name).exists()


@pytest.mark.parametrize(
    "code",
    [
        b"cos\nsystem\n(S'touch {}'\ntR.",  # REDUCE
        b"(S'touch {}'\nios\nsystem\n.",  # INST
        b"(cos\nsystem\nS'touch {}'\no.",  # OBJ
        b"\x8c\x02os\x8c\x06system\x93(S'touch {}'\ntR.",  # STACK_GLOBAL
        b"cpytorch_lightning\nos.system\n(S'touch {}'\ntR.",  # a function reached through a package of stubs
        b"ctorch\nnn.modules.module.os.system\n(S'touch {}'\ntR.",
        b"ctorch._utils\nos.system\n(S'touch {}'\ntR.",
    ],
)
def test_instructions_by_hand_run_nothing(code: bytes, tmp_path: Path) -> None:
    path, marker = tmp_path / "evil.ckpt", tmp_path / "marker"
    path.write_bytes(code.replace(b"{}", str(marker).encode()))
    message(path)
    assert not marker.exists()


def test_a_file_cannot_change_what_it_is_given(tmp_path: Path) -> None:
    """BUILD sets attributes: on our functions, on classes, and on the dict that holds the weights."""
    path = tmp_path / "a.ckpt"
    for target in (b"ctorch._utils\n_rebuild_tensor_v2\n", b"ctorch.nn\nModule\n", b"ctorch\nfloat32\n"):
        change = target + b"(N(S'__defaults__'\n(I1\nI2\ntS'append'\nNdtb"
        path.write_bytes(b"\x80\x02" + change + b".")
        message(path)
    for name in ("collections\nOrderedDict", "torch\nSize"):
        path.write_bytes(f"c{name}\n(N(S'x'\nI1\ndtb.".encode())
        message(path)
    assert not hasattr(OrderedDict, "x")
    state = Evil(OrderedDict)
    state.call = OrderedDict, (), {"items": 1, "get": 2}, None, iter([("a", torch.arange(3.0))])  # type: ignore[assignment]
    assert equal(read_tensors(save(state, path))["a"], torch.arange(3.0))


def test_a_torchscript_program_is_refused(tmp_path: Path) -> None:
    path = save({"a": torch.ones(2)}, tmp_path / "a.ckpt")
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("a/constants.pkl", b"")
    assert "TorchScript" in message(path)


def test_compressed_records_are_refused(tmp_path: Path) -> None:
    source = save({"a": torch.zeros(1000)}, tmp_path / "a.ckpt")
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(tmp_path / "b.ckpt", "w", zipfile.ZIP_DEFLATED) as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))
    assert "compressed" in message(tmp_path / "b.ckpt")


@FORMATS
@pytest.mark.parametrize(
    ("offset", "size", "stride"),
    [(0, (9,), (1,)), (1, (8,), (1,)), (0, (2,), (8,)), (-1, (2,), (1,)), (0, (-1,), (1,)), (0, (2, 2), (1,))],
)
def test_a_tensor_beyond_its_storage_is_refused(
    offset: int, size: tuple[int, ...], stride: tuple[int, ...], is_zip: bool, tmp_path: Path
) -> None:
    storage = torch.storage.TypedStorage(
        wrap_storage=torch.arange(8.0).untyped_storage(), dtype=torch.float32, _internal=True
    )
    lie = Evil(torch._utils._rebuild_tensor_v2, storage, offset, size, stride, False, OrderedDict())
    assert "'a' does not lie within its storage" in message(save({"a": lie}, tmp_path / "a.ckpt", is_zip))


def test_tensors_of_other_kinds_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.ckpt"
    sparse = torch.sparse_coo_tensor([[0, 1]], [1.0, 2.0], check_invariants=True)
    assert "_rebuild_sparse_tensor" in message(save({"a": sparse}, path))
    assert "plain view" in message(save({"a": torch.tensor([1 + 2j]).conj()}, path))

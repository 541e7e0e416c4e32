"""Checkpoints of other programs give their tensors, and errors say what is wrong with a file."""

import builtins
import sys
import zipfile
from argparse import Namespace
from collections import OrderedDict, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import accumulate
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from tests.helpers.checkpoints import FORMATS, equal, message, save, tensor_names
from tfmq_exp.denoisers.loading.checkpoint import read_tensors


@contextmanager
def foreign() -> Iterator[dict[str, type]]:
    """Classes of libraries that are there only while a file is written."""
    names = {
        "pytorch_lightning.callbacks.x": "ModelCheckpoint",
        "omegaconf.dictionary_of_another_version": "DictConfig",
        "ldm.lr_scheduler": "LambdaLinearScheduler",
        "taming.modules.losses": "Loss",
        "lightning.pytorch.utilities": "AttributeDict",
    }
    classes: dict[str, type] = {}
    modules = {}
    for module, name in names.items():
        base = dict if name == "AttributeDict" else object
        classes[name] = type(name, (base,), {"__module__": module})
        modules[module] = ModuleType(module)
        setattr(modules[module], name, classes[name])
    with pytest.MonkeyPatch.context() as patch:
        for module in modules:
            for parent in accumulate(module.split("."), "{}.{}".format):
                patch.setitem(sys.modules, parent, modules.get(parent, ModuleType(parent)))
        yield classes


def lightning(classes: dict[str, type], state: Any) -> dict[str, Any]:
    """A file as Lightning writes it, with what users of LDM had in theirs."""
    callback, config, settings = (classes[name]() for name in ("ModelCheckpoint", "DictConfig", "AttributeDict"))
    callback.best = np.float64(0.25)
    callback.folder = Path("/logs")
    config.__dict__.update(
        {"_content": {"lr": 1e-4, "kinds": [list, int, str, Any]}, "_cache": defaultdict(list, a=[1])}
    )
    settings.update(loss=classes["Loss"](), device=torch.device("cpu"))
    return {
        "epoch": 3,
        "pytorch-lightning_version": "1.4.2",
        "callbacks": {classes["ModelCheckpoint"]: {"best": np.float32(1), "seen": {1, 2}}, "again": callback},
        "optimizer_states": [{"state": {0: {"exp_avg": torch.full((4000,), 7.0)}}, "param_groups": []}],
        "lr_schedulers": [classes["LambdaLinearScheduler"](), np.arange(3)],
        "hyper_parameters": settings,
        "config": Namespace(config=config, extra=frozenset({1}), bytes=b"\xff", number=1 + 2j, steps=range(3)),
        "state_dict": state,
    }


def awkward() -> "OrderedDict[str, Any]":
    """Tensors in every form that a state dict may hold them in."""
    base = torch.randn(6, 5, generator=torch.Generator().manual_seed(0))
    state: OrderedDict[str, Any] = OrderedDict(nn.Linear(3, 2).state_dict())
    state |= {str(dtype): base.to(dtype) for dtype in (torch.float64, torch.float16, torch.bfloat16, torch.int64)}
    state |= {str(dtype): base.to(dtype) for dtype in (torch.float8_e4m3fn, torch.float8_e5m2, torch.bool, torch.int8)}
    parameter = nn.Parameter(base.clone())
    parameter.note = "of a program"  # type: ignore[attr-defined]
    extra = {
        "uint16": torch.tensor([1, 2, 60_000], dtype=torch.uint16),
        "complex": torch.tensor([1 + 2j]),
        "special": torch.tensor([float("nan"), -0.0, float("inf")]),
        "base": base,
        "transposed": base.T,
        "part": base[1:4, 2],
        "expanded": base[:1].expand(4, 5),
        "parameter": nn.Parameter(base + 1),
        "parameter with attributes": parameter,
        "scalar": torch.tensor(0.25),
        "empty": torch.empty(0, 3),
    }
    return state | extra  # type: ignore[return-value]


def no_import(name: str, *_rest: Any, **_options: Any) -> Any:
    raise AssertionError(f"imports {name}")


@FORMATS
@pytest.mark.parametrize("protocol", [2, 4])
def test_lightning_files_load_bit_for_bit(is_zip: bool, protocol: int, tmp_path: Path, monkeypatch: Any) -> None:
    state = awkward()
    others = {"number": 3, "array": np.ones(2), "nothing": None}
    with foreign() as classes:
        value = lightning(classes, OrderedDict({**state, **others}))
        path = save(value, tmp_path / "last.ckpt", is_zip, protocol)
    with monkeypatch.context() as patch:
        patch.setattr(builtins, "__import__", no_import)
        tensors = read_tensors(path)
    assert list(tensors) == list(state)
    for name, value in state.items():
        assert equal(tensors[name], value.detach()), name
        assert tensors[name].stride() == value.stride()
        assert type(tensors[name]) is Tensor
        assert not tensors[name].requires_grad
    addresses = {tensors[name].untyped_storage().data_ptr() for name in ("base", "transposed", "part", "expanded")}
    assert len(addresses) == 1


@FORMATS
@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_bare_state_dicts_of_every_protocol(is_zip: bool, protocol: int, tmp_path: Path) -> None:
    state = awkward()
    tensors = read_tensors(save(state, tmp_path / "a.pth", is_zip, protocol))
    assert all(equal(tensors[name], value.detach()) for name, value in state.items())
    assert list(tensors) == list(state)


def test_safetensors(tmp_path: Path) -> None:
    state = {"a": torch.arange(4).to(torch.float8_e4m3fn), "b.c": torch.ones(2, 2)}
    save_file(state, tmp_path / "a.safetensors")
    tensors = read_tensors(tmp_path / "a.safetensors")
    assert all(equal(tensors[name], value) for name, value in state.items())


def test_the_bytes_say_what_a_file_is(tmp_path: Path) -> None:
    """Its suffix says nothing."""
    state = {"a": torch.arange(4).to(torch.float8_e4m3fn), "b.c": torch.ones(2, 2)}
    for suffix in ("safetensors", "ckpt", "pt", "pth", "bin", "part", "index", "zip", "download"):
        for write in (
            lambda path: save(state, path),
            lambda path: save(state, path, False),
            lambda p: save_file(state, p),
        ):
            path = tmp_path / f"a.{suffix}"
            write(path)
            assert sorted(tensor_names(path)) == sorted(state)
            assert all(equal(tensor, state[name]) for name, tensor in read_tensors(path).items())


def test_states_of_the_optimizer_are_not_read(tmp_path: Path) -> None:
    """Their bytes may be missing altogether."""
    value = {"state_dict": {"a": torch.arange(5.0)}, "optimizer_states": [torch.zeros(100_000)]}
    source = save(value, tmp_path / "a.ckpt")
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(tmp_path / "b.ckpt", "w") as new:
        for name in old.namelist():
            if old.getinfo(name).file_size < 400_000:
                new.writestr(name, old.read(name))
    tensors = read_tensors(tmp_path / "b.ckpt")
    assert equal(tensors["a"], torch.arange(5.0))
    kept = read_tensors(save(value, tmp_path / "c.ckpt", is_zip=False))
    assert sum(tensor.untyped_storage().nbytes() for tensor in kept.values()) == 20


@FORMATS
def test_truncated_files(is_zip: bool, tmp_path: Path) -> None:
    content = save({"state_dict": awkward()}, tmp_path / "a.ckpt", is_zip).read_bytes()
    path = tmp_path / "short.ckpt"
    for length in (1, 3, 4, 20, 100, len(content) // 3, len(content) // 2, len(content) * 9 // 10, len(content) - 1):
        path.write_bytes(content[:length])
        assert any(word in message(path) for word in ("truncated", "damaged", "no checkpoint"))


def test_changed_bytes_are_noticed(tmp_path: Path) -> None:
    content = bytearray(save({"a": torch.zeros(1000)}, tmp_path / "a.ckpt").read_bytes())
    content[content.index(bytes(2000)) + 1000] = 1
    (tmp_path / "a.ckpt").write_bytes(content)
    assert "damaged" in message(tmp_path / "a.ckpt")


def test_what_is_no_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "a.ckpt"
    with pytest.raises(FileNotFoundError, match=r"a\.ckpt"):
        read_tensors(path)
    for content in (
        b"",
        b"some text\n",
        b"config:\n  a: 1\n",
        b"PK\x03\x04",
        b"\x80\x02}q\x00.",
        bytes(600),
        b"(" * 600,
    ):
        path.write_bytes(content)
        assert "checkpoint" in message(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/b.txt", "text")
    assert "zip" in message(path)
    message(tmp_path)
    for value in ([], {}, 3, {"state_dict": 3}, {"state_dict": {}}, torch.ones(2), [1, 2, 3, 4, 5]):
        assert "holds no weights" in message(save(value, path))

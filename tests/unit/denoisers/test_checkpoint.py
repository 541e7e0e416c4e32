"""Checkpoints of other programs give their tensors, and never run what is in them."""

import builtins
import io
import os
import pickle
import re
import subprocess
import sys
import zipfile
from argparse import Namespace
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import accumulate
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tfmq_exp.denoisers.loading.checkpoint import read_tensors, read_weights, select_names, tensor_names
from torch import Tensor, nn

GOLDENS = Path(__file__).parents[2] / "goldens"
FORMATS = pytest.mark.parametrize("is_zip", [True, False], ids=["zip", "legacy"])


def save(value: Any, path: Path, is_zip: bool = True, protocol: int = 2) -> Path:
    torch.save(value, path, _use_new_zipfile_serialization=is_zip, pickle_protocol=protocol)
    return path


def equal(a: Tensor, b: Tensor) -> bool:
    same = a.shape == b.shape and a.dtype == b.dtype
    return same and a.contiguous().reshape(-1).view(torch.uint8).equal(b.contiguous().reshape(-1).view(torch.uint8))


def message(path: Path) -> str:
    with pytest.raises(ValueError, match=r"\S") as caught:
        read_tensors(path)
    text = str(caught.value)
    assert text.startswith(f"{path}: ")
    assert "\n" not in text
    return text


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


def test_tensors_of_other_kinds_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.ckpt"
    sparse = torch.sparse_coo_tensor([[0, 1]], [1.0, 2.0], check_invariants=True)
    assert "_rebuild_sparse_tensor" in message(save({"a": sparse}, path))
    assert "plain view" in message(save({"a": torch.tensor([1 + 2j]).conj()}, path))


@FORMATS
def test_files_of_the_ddim_program(is_zip: bool, tmp_path: Path) -> None:
    state = {"conv_in.weight": torch.ones(2, 3), "down.0.block.0.norm1.bias": torch.zeros(4)}
    averages = {name: value + 0.5 for name, value in state.items()}
    parallel = OrderedDict((f"module.{name}", value) for name, value in state.items())
    optimizer = {"state": {0: {"exp_avg": torch.ones(9)}}}
    path = save([parallel, optimizer, 3, 1000, averages], tmp_path / "ckpt.pth", is_zip)
    for ema, expected in ((False, state), (True, averages)):
        selected = read_weights(path, "", ema)
        assert list(selected) == list(expected)
        assert all(equal(selected[name], value) for name, value in expected.items())
    without = read_tensors(save([parallel, optimizer, 3, 1000], path, is_zip))
    assert list(without) == list(state)
    with pytest.raises(ValueError, match=r"ckpt\.pth: .*ema=false"):
        read_weights(path, "", ema=True)


def test_ema_copies_of_an_ldm_model(tmp_path: Path) -> None:
    """The names of a real model, with EMA copies by the rule that LDM follows."""
    tensors = load_file(GOLDENS / "compvis" / "ldm_lsun_beds.model.safetensors")
    prefix = "model.diffusion_model."
    names = [name for name in tensors if name.startswith(prefix)]
    copies = {"model_ema." + name[len("model.") :].replace(".", ""): tensors[name].float() + 1 for name in names}
    everything = {
        **tensors,
        **copies,
        "model_ema.decay": torch.tensor(0.9999),
        "model_ema.num_updates": torch.tensor(1),
    }
    assert "model_ema.diffusion_modelout2bias" in everything
    path = save({"state_dict": everything}, tmp_path / "a.ckpt")
    raw, averaged = (read_weights(path, prefix, ema) for ema in (False, True))
    assert list(raw) == list(averaged) == [name.removeprefix(prefix) for name in names]
    assert all(equal(raw[name], tensors[prefix + name]) for name in raw)
    assert all(equal(averaged[name], raw[name].float() + 1) for name in raw)
    with pytest.raises(ValueError, match=f"of {len(names)} of {len(names)} weights below '{prefix}'.*ema=false"):
        select_names(tensors, prefix, ema=True)
    del everything["model_ema.diffusion_modelout2bias"]
    with pytest.raises(ValueError, match=r"of 1 of .*diffusion_model\.out\.2\.bias"):
        select_names(everything, prefix, ema=True)
    with pytest.raises(ValueError, match=r"below 'model\.unet\.'.*first_stage_model\., model\.$"):
        select_names(tensors, "model.unet.", ema=False)


@pytest.mark.parametrize("suffix", ["ckpt", "safetensors"])
def test_weights_that_nobody_asked_for_are_not_read(suffix: str, tmp_path: Path) -> None:
    state = {"model.a": torch.arange(3.0), "model_ema.a": torch.full((50_000,), 2.0)}
    path = tmp_path / f"a.{suffix}"
    (save if suffix == "ckpt" else save_file)(state, path)
    assert sorted(tensor_names(path)) == sorted(state)
    if suffix == "ckpt":  # their bytes may be missing altogether
        with zipfile.ZipFile(path) as old, zipfile.ZipFile(tmp_path / "b.ckpt", "w") as new:
            for name in old.namelist():
                if old.getinfo(name).file_size < 200_000:
                    new.writestr(name, old.read(name))
        path = tmp_path / "b.ckpt"
    assert equal(read_weights(path, "model.", ema=False)["a"], state["model.a"])
    assert list(read_tensors(path, ["model.a"])) == ["model.a"]


def test_ema_copies_that_cannot_be_told_apart() -> None:
    tensors = {"a.1.1": torch.ones(1), "a.11": torch.ones(1), "model_ema.a11": torch.ones(1)}
    with pytest.raises(ValueError, match="told apart"):
        select_names(tensors, "", ema=True)

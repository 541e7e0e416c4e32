"""Pickles of `torch.save`, read without running anything that they ask for.

A pickle is a program. Here it runs against a fixed table: what describes a tensor becomes a plain record, classes of
known training libraries become inert stand-ins, and any other name ends the reading. No name is ever looked up in a real
module. Before it runs, `pickle_limits` has seen that it needs no more memory and time than a checkpoint does.
"""

import io
import pickle
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from collections import OrderedDict
from typing import Any, NamedTuple

import torch

from tfmq_exp.denoisers.pickle_limits import LONGEST_PICKLE, RefusedError, check_limits

__all__ = ["LONGEST_PICKLE", "RefusedError", "Storage", "TensorRecord", "load_pickle"]

DTYPES = {name: value for name, value in vars(torch).items() if isinstance(value, torch.dtype)}
NAMES = "Double Float Half BFloat16 Long Int Short Char Byte Bool ComplexFloat ComplexDouble Untyped"
STORED = "float64 float32 float16 bfloat16 int64 int32 int16 int8 uint8 bool complex64 complex128 uint8"
STORAGES = {f"{name}Storage": DTYPES[stored] for name, stored in zip(NAMES.split(), STORED.split(), strict=True)}
# None of these objects can be changed, so a file that tries to leaves no trace.
VALUES: dict[str, Any] = {
    **{f"{module}.{name}": d for module in ("torch", "torch.cuda", "torch.storage") for name, d in STORAGES.items()},
    **{f"torch.{name}": value for name, value in DTYPES.items()},
}
STUB_PACKAGES = (
    *("pytorch_lightning.", "lightning.", "lightning_fabric.", "lightning_utilities.", "torchmetrics."),
    *("omegaconf.", "ldm.", "taming.", "torch.nn.", "torch.optim."),
)
# Settings, counters and paths that training code keeps beside the weights.
STUBS = frozenset(
    f"{module}.{name}"
    for module, names in {
        "argparse": "Namespace",
        "builtins": "bool bytearray bytes complex dict float frozenset int list object range set slice str tuple",
        "collections": "Counter defaultdict deque",
        "copyreg": "_reconstructor",
        "datetime": "date datetime timedelta timezone",
        "pathlib": "Path PosixPath PurePath PurePosixPath PureWindowsPath WindowsPath",
        "pathlib._local": "Path PosixPath PurePath PurePosixPath PureWindowsPath WindowsPath",
        "typing": "Any Dict List Optional Tuple Union",
        "_codecs": "encode",
        "numpy": "dtype ndarray",
        "numpy.core.multiarray": "_reconstruct scalar",
        "numpy._core.multiarray": "_reconstruct scalar",
        "torch": "device",
    }.items()
    for name in names.split()
)


class Storage(NamedTuple):
    """Bytes somewhere in the file: their key there, the type of elements they were saved as, and how many bytes."""

    key: str
    dtype: torch.dtype
    size: int


class TensorRecord(NamedTuple):
    """A tensor whose bytes were not read yet."""

    storage: Storage
    dtype: torch.dtype
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]


class Inert:
    """Stands for a foreign object: takes every argument, state and item, and keeps none."""

    __slots__ = ()

    def __init__(self, *_args: Any, **_options: Any) -> None:
        pass

    __setstate__ = __setitem__ = append = extend = add = __init__


def stand_ins() -> dict[str, Any]:
    """Our own functions behind the names by which torch pickles a tensor, and a class as `Inert` behind its own.

    They are made anew for every pickle, because a pickle may set attributes of what it was given.
    """

    def tensor(storage: Any, offset: Any, size: Any, stride: Any, *rest: Any) -> TensorRecord:
        if not isinstance(storage, Storage) or any(rest[2:]):  # the third is the conjugate or negative flag
            raise RefusedError("holds a tensor that is not a plain view of stored numbers")
        return TensorRecord(storage, storage.dtype, offset, size, stride)

    def typed_tensor(storage: Any, offset: Any, size: Any, stride: Any, *rest: Any) -> TensorRecord:
        gradient, hooks, dtype, *flags = rest
        return tensor(storage, offset, size, stride, gradient, hooks, *flags)._replace(dtype=dtype)

    def parameter(data: Any, *_rest: Any) -> Any:
        return data

    def ordered(items: Any = ()) -> "OrderedDict[Any, Any]":
        if not all(type(key) is str for key, _ in items):
            raise RefusedError("holds an OrderedDict with keys that are no text")
        return OrderedDict(items)

    def size(numbers: Any = ()) -> tuple[int, ...]:
        if not all(type(number) is int for number in numbers):
            raise RefusedError("holds a torch.Size of something else than integers")
        return tuple(numbers)

    functions = {"tensor": tensor, "tensor_v2": tensor, "tensor_v3": typed_tensor}
    functions |= {"parameter": parameter, "parameter_with_state": parameter}
    stub = type("Stub", (Inert,), {"__slots__": ()})
    return {
        "Inert": stub,
        "collections.OrderedDict": ordered,
        "torch.Size": size,
        **{f"torch._utils._rebuild_{name}": function for name, function in functions.items()},
    }


class Unpickler(pickle.Unpickler):
    """Reads a pickle of `torch.save` that may name only what stands in the tables above."""

    def __init__(self, file: Any) -> None:
        super().__init__(file, encoding="utf-8")
        self.known = {**VALUES, **stand_ins()}
        self.storages: dict[str, Storage] = {}

    def find_class(self, module: str, name: str, /) -> Any:
        """What stands for this name; RefusedError for a name outside the tables."""
        # protocols 0 to 2 write the names of Python 2
        name = ".".join(NAME_MAPPING.get((module, name), (IMPORT_MAPPING.get(module, module), name)))
        if not all(part.isidentifier() for part in name.split(".")):
            raise pickle.UnpicklingError("not a name")  # text that happens to look like an instruction
        if name in STUBS or name.startswith(STUB_PACKAGES):
            return self.known["Inert"]
        if name in self.known:
            return self.known[name]
        raise RefusedError(
            f"refuses to load {name[:100]!r}: neither a part of a tensor nor a class of a known training library, and it "
            "could run code; expected a checkpoint of tensors and settings, such as the state dict alone"
        )

    def persistent_load(self, pid: Any) -> Any:
        """The storage, or in older files the class of a whole module, that the pickle refers to."""
        kind, first, *rest = pid
        if kind == "module":
            return first
        key, _device, count, *view = rest
        valid = isinstance(first, torch.dtype) and isinstance(key, str) and isinstance(count, int) and count >= 0
        if kind != "storage" or not valid or any(part is not None for part in view):
            raise RefusedError("holds a storage in an unknown form")
        storage = Storage(key, first, count * first.itemsize)
        self.storages.setdefault(key, storage)
        return storage


def load_pickle(file: io.BytesIO) -> tuple[Any, dict[str, Storage]]:
    """What the pickle at the present position describes, and its storages by their keys; the position moves behind it.

    Raises:
        RefusedError: it asks for what no checkpoint needs: other names, or more memory or time than its length is worth.
        Exception: any, of a damaged one.
    """
    start = file.tell()
    check_limits(file)
    file.seek(start)
    unpickler = Unpickler(file)
    return unpickler.load(), unpickler.storages

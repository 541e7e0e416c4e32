"""Pickles of `torch.save`: the parts of tensors become records, and the classes of training libraries stubs."""

import io
from collections import OrderedDict
from typing import Any, NamedTuple

import torch

from tfmq_exp.core.safe_pickle import RefusedError, SafeUnpickler

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
PATHS = "Path PosixPath PurePath PurePosixPath PureWindowsPath WindowsPath"
# Settings, counters and paths that training programs keep with the weights.
STUBS = frozenset(
    f"{module}.{name}"
    for module, names in {
        "argparse": "Namespace",
        "builtins": "bool bytearray bytes complex dict float frozenset int list object range set slice str tuple",
        "collections": "Counter defaultdict deque",
        "copyreg": "_reconstructor",
        "datetime": "date datetime timedelta timezone",
        "pathlib": PATHS,
        "pathlib._local": PATHS,
        "typing": "Any Dict List Optional Tuple Union",
        "_codecs": "encode",
        "numpy": "dtype ndarray",
        "numpy.core.multiarray": "_reconstruct scalar",
        "numpy._core.multiarray": "_reconstruct scalar",
        "torch": "device",
    }.items()
    for name in names.split()
)


class StorageRecord(NamedTuple):
    """Bytes in the file: their key there, the type of elements they were saved as, and the number of bytes."""

    key: str
    dtype: torch.dtype
    size: int


class TensorRecord(NamedTuple):
    """A tensor whose bytes were not read yet."""

    storage: StorageRecord
    dtype: torch.dtype
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]


class Stub:
    """A foreign object: takes every argument, state and item, and keeps none."""

    __slots__ = ()

    def __init__(self, *_args: Any, **_options: Any) -> None:
        pass

    __setstate__ = __setitem__ = append = extend = add = __init__


def rebuilders() -> dict[str, Any]:
    """Functions by the names with which torch pickles a tensor, and a `Stub` class; new for every pickle, which may change them."""

    def tensor(storage: Any, offset: Any, size: Any, stride: Any, *rest: Any) -> TensorRecord:
        if not isinstance(storage, StorageRecord) or any(rest[2:]):  # the third is the conjugate or negative flag
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
    names = {f"torch._utils._rebuild_{name}": function for name, function in functions.items()}
    stub = type("Stub", (Stub,), {"__slots__": ()})
    return {**names, "collections.OrderedDict": ordered, "torch.Size": size, "Stub": stub}


class CheckpointUnpickler(SafeUnpickler):
    """Reads a pickle of `torch.save`: the parts of tensors become records, training libraries' classes stubs."""

    refusal = (
        "neither a part of a tensor nor a class of a known training library, and it could run code; expected a checkpoint of "
        "tensors and settings, such as the state dict alone"
    )

    def __init__(self, content: io.BytesIO) -> None:
        super().__init__(content, encoding="utf-8")
        self.names = {**VALUES, **rebuilders()}
        self.storages: dict[str, StorageRecord] = {}

    def known(self, name: str) -> Any:
        return self.names["Stub"] if name in STUBS or name.startswith(STUB_PACKAGES) else self.names.get(name)

    def persistent_load(self, pid: Any) -> Any:
        """The storage, or in older files the class of a whole module, that the pickle refers to."""
        kind, first, *rest = pid
        if kind == "module":
            return first
        key, _device, count, *view = rest
        valid = isinstance(first, torch.dtype) and isinstance(key, str) and isinstance(count, int) and count >= 0
        if kind != "storage" or not valid or any(part is not None for part in view):
            raise RefusedError("holds a storage in an unknown form")
        storage = StorageRecord(key, first, count * first.itemsize)
        self.storages.setdefault(key, storage)
        return storage


def load_pickle(file: io.BytesIO) -> tuple[Any, dict[str, StorageRecord]]:
    """Read the pickle at the present position, and its storages by their keys; the position moves behind it."""
    unpickler = CheckpointUnpickler(file)
    return unpickler.load(), unpickler.storages

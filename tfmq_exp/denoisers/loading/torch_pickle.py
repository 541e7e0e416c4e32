"""Pickles of `torch.save`, read without running what they ask for.

A pickle is a program. Here it may use the names of a fixed table alone: the parts of tensors become records, the classes of training
libraries stubs, and no object is changed once it is built. A few bytes may also ask for unlimited work, such as the hash of a key of
tuples within tuples (2^45 parts), so instructions and keys have limits. `torch.load(weights_only=True)` has none: it hangs or crashes
on such keys, and it refuses the sets and bytes of other programs.
"""

import pickle
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from collections import OrderedDict
from collections.abc import Callable
from io import BytesIO
from itertools import islice
from typing import Any, NamedTuple

import torch

MOST_INSTRUCTIONS = 400_000  # checkpoints have thirty for each tensor
HEAVIEST_KEY, MOST_HEAVY_KEYS = 100, 10_000  # parts of a key, and how many keys may have more than one
LARGEST_KEY = 60  # bits; the hashes of larger integers can all be made equal
PythonUnpickler: Any = pickle._Unpickler  # that of C hashes keys before they can be checked
DTYPES = {name: value for name, value in vars(torch).items() if isinstance(value, torch.dtype)}
NAMES = "Double Float Half BFloat16 Long Int Short Char Byte Bool ComplexFloat ComplexDouble Untyped"
STORED = "float64 float32 float16 bfloat16 int64 int32 int16 int8 uint8 bool complex64 complex128 uint8"
STORAGES = {f"{name}Storage": DTYPES[stored] for name, stored in zip(NAMES.split(), STORED.split(), strict=True)}
STUB_PACKAGES = (
    *("pytorch_lightning.", "lightning.", "lightning_fabric.", "lightning_utilities.", "torchmetrics."),
    *("omegaconf.", "ldm.", "taming.", "torch.nn.", "torch.optim."),
)
PATHS = "Path PosixPath PurePath PurePosixPath PureWindowsPath WindowsPath"
# Settings, counters and paths that training programs keep with the weights.
STUBS = {
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
}


class RefusedError(ValueError):
    """Something in a file that is understood, and not accepted."""


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
    """A foreign object: takes every argument and item, and keeps none."""

    __slots__ = ()

    def __init__(self, *_args: Any, **_options: Any) -> None:
        pass

    __setitem__ = append = extend = add = __init__


def build_tensor(storage: Any, *parts: Any) -> TensorRecord:
    offset, size, stride, *rest = parts
    if not isinstance(storage, StorageRecord) or any(rest[2:]):  # the conjugate or negative flag
        raise RefusedError("holds a tensor that is not a plain view of stored numbers")
    return TensorRecord(storage, storage.dtype, offset, size, stride)


def build_typed_tensor(*parts: Any) -> TensorRecord:
    return build_tensor(*parts[:6], *parts[7:])._replace(dtype=parts[6])


def build_dict(items: Any = ()) -> "OrderedDict[Any, Any]":
    if not all(type(key) is str for key, _ in items):
        raise RefusedError("holds an OrderedDict with keys that are no text")
    return OrderedDict(items)


def build_size(numbers: Any = ()) -> tuple[int, ...]:
    if not all(type(number) is int for number in numbers):
        raise RefusedError("holds a torch.Size of something else than integers")
    return tuple(numbers)


KNOWN: dict[str, Any] = {
    **{f"{module}.{name}": d for module in ("torch", "torch.cuda", "torch.storage") for name, d in STORAGES.items()},
    **{f"torch.{name}": value for name, value in DTYPES.items()},
    **{f"{module}.{name}": Stub for module, names in STUBS.items() for name in names.split()},
    **dict.fromkeys(("torch._utils._rebuild_tensor", "torch._utils._rebuild_tensor_v2"), build_tensor),
    "torch._utils._rebuild_tensor_v3": build_typed_tensor,
    "torch._utils._rebuild_parameter": lambda data, *_: data,
    "torch._utils._rebuild_parameter_with_state": lambda data, *_: data,
    "collections.OrderedDict": build_dict,
    "torch.Size": build_size,
}


def parts_of(key: Any) -> int:
    """The number of objects that are visited to hash a key; `HEAVIEST_KEY` + 1 for all that is more."""
    waiting, count = [key], 0
    while waiting and count <= HEAVIEST_KEY:
        part = waiting.pop()
        count += 1
        if isinstance(part, tuple | frozenset):
            waiting += islice(part, HEAVIEST_KEY + 1)
        elif type(part) is int and part.bit_length() > LARGEST_KEY:
            return HEAVIEST_KEY + 1
    return count


class CheckpointUnpickler(PythonUnpickler):
    """An unpickler with limits and a fixed table of names; it notes the storages that tensors refer to."""

    def __init__(self, content: BytesIO) -> None:
        super().__init__(content, encoding="utf-8")
        self.instructions = self.heavy_keys = 0
        self.storages: dict[str, StorageRecord] = {}

    def find_class(self, module: str, name: str, /) -> Any:
        """Look a name up; RefusedError for one that is not known."""
        # protocols 0 to 2 write the names of Python 2
        full = ".".join(NAME_MAPPING.get((module, name), (IMPORT_MAPPING.get(module, module), name)))
        if not all(part.isidentifier() for part in full.split(".")):
            raise pickle.UnpicklingError("not a name")  # text that happens to look like an instruction
        if (found := Stub if full.startswith(STUB_PACKAGES) else KNOWN.get(full)) is None:
            reason = "neither a part of a tensor nor a class of a known training library, so it could run code"
            raise RefusedError(f"refuses to load {full[:100]!r}: {reason}; expected tensors and settings alone")
        return found

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


ALL, PAIRS = slice(None), slice(None, None, 2)
# Where on the stack an instruction finds what it hashes.
HASHED = {
    **{pickle.SETITEM: slice(-2, -1), pickle.SETITEMS: PAIRS, pickle.DICT: PAIRS},
    **{pickle.ADDITEMS: ALL, pickle.FROZENSET: ALL},
}
# Bytes in the place of a bytearray, whose memory is taken before its content is there; no attributes are set.
REPLACED = {pickle.BYTEARRAY8: pickle.BINBYTES8, pickle.BUILD: pickle.POP}
REGISTERED = (pickle.EXT1, pickle.EXT2, pickle.EXT4)  # objects that other programs registered: never those of a file


def checked(code: bytes) -> Callable[[CheckpointUnpickler], None]:
    """An instruction of the unpickler that is checked before it runs; RefusedError for more than any file has."""
    run, keys = PythonUnpickler.dispatch[REPLACED.get(code, code)[0]], HASHED.get(code, slice(0))

    def instruction(unpickler: CheckpointUnpickler) -> None:
        unpickler.instructions += 1
        if unpickler.instructions > MOST_INSTRUCTIONS:
            raise RefusedError(f"has a pickle of more than {MOST_INSTRUCTIONS} instructions")
        for key in unpickler.stack[keys]:
            parts = parts_of(key)
            unpickler.heavy_keys += parts > 1
            if parts > HEAVIEST_KEY or unpickler.heavy_keys > MOST_HEAVY_KEYS:
                raise RefusedError("has keys of tuples within tuples, of very large numbers, or too many such keys")
        run(unpickler)

    return instruction


codes = (bytes([code]) for code in PythonUnpickler.dispatch)
CheckpointUnpickler.dispatch = {code[0]: checked(code) for code in codes if code not in REGISTERED}


def load_pickle(file: BytesIO) -> tuple[Any, dict[str, StorageRecord]]:
    """Read the pickle at the present position, and its storages by their keys; the position moves behind it."""
    unpickler = CheckpointUnpickler(file)
    return unpickler.load(), unpickler.storages

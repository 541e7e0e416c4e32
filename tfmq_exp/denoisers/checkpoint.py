"""Tensors of original checkpoint files, read without running anything the files ask for.

A checkpoint of ``torch.save`` is a pickle, and a pickle is a program. Here it runs against a fixed table: what describes
a tensor becomes a plain record, classes of known training libraries become inert stand-ins, and any other name ends the
reading. No name is ever looked up in a real module. Formats: `torch.serialization` (zip, and before torch 1.6 pickles
followed by the storages).
"""

import pickle
import zipfile
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from collections import OrderedDict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, TypeAlias

import torch
from safetensors.torch import load_file
from torch import Tensor

LEGACY = (0x1950A86A20F9469CFC6C, 1001)  # magic number and version, as torch.serialization has them
EMA = "model_ema."

DTYPES = {name: value for name, value in vars(torch).items() if isinstance(value, torch.dtype)}
NAMES = "Double Float Half BFloat16 Long Int Short Char Byte Bool ComplexFloat ComplexDouble Untyped"
STORED = "float64 float32 float16 bfloat16 int64 int32 int16 int8 uint8 bool complex64 complex128 uint8"
STORAGES = {f"{name}Storage": DTYPES[stored] for name, stored in zip(NAMES.split(), STORED.split(), strict=True)}
# None of these objects can be changed, so a file that tries to leaves no trace.
VALUES: dict[str, Any] = {
    **{f"{module}.{name}": d for module in ("torch", "torch.cuda", "torch.storage") for name, d in STORAGES.items()},
    **{f"torch.{name}": value for name, value in DTYPES.items()},
    "torch.Size": tuple,
    "collections.OrderedDict": OrderedDict,
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


class RefusedError(ValueError):
    """Something in the file that is understood, and not accepted."""


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


Reader: TypeAlias = Callable[[Storage], Tensor]  # the bytes of a storage


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

    functions = {"tensor": tensor, "tensor_v2": tensor, "tensor_v3": typed_tensor}
    functions |= {"parameter": parameter, "parameter_with_state": parameter}
    stub = type("Stub", (Inert,), {"__slots__": ()})
    return {"Inert": stub, **{f"torch._utils._rebuild_{name}": function for name, function in functions.items()}}


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


def open_zip(file: BinaryIO) -> tuple[Any, Reader]:
    """What a zip file of `torch.save` holds, and how to read its storages."""
    archive = zipfile.ZipFile(file)
    records = {record.filename: record for record in archive.infolist()}
    pickles = [name for name in records if name.count("/") == 1 and name.endswith("/data.pkl")]
    prefix = pickles[0].removesuffix("data.pkl") if pickles else ""
    if len(pickles) != 1 or prefix + "constants.pkl" in records:
        raise RefusedError("is a zip file or a TorchScript program; expected a checkpoint of torch.save")
    if any(record.compress_type != zipfile.ZIP_STORED for record in records.values()):
        raise RefusedError("holds compressed records, which can grow without limit; torch.save never writes them")
    if prefix + "byteorder" in records and archive.read(prefix + "byteorder") != b"little":
        raise RefusedError("was saved in another byte order; expected little-endian numbers")

    def read(storage: Storage) -> Tensor:
        name = f"{prefix}data/{storage.key}"
        if archive.getinfo(name).file_size != storage.size:
            raise RefusedError(f"is damaged: record {name!r} is not as long as its tensors say")
        with archive.open(name) as record:
            return read_bytes(record, storage.size)

    with archive.open(pickles[0]) as record:
        return Unpickler(record).load(), read


def open_legacy(file: BinaryIO) -> tuple[Any, Reader]:
    """What a file of `torch.save` before the zip format holds, and how to read its storages."""
    magic, version, machine = (Unpickler(file).load() for _ in range(3))
    if (magic, version) != LEGACY or not machine["little_endian"]:
        raise RefusedError("is not a checkpoint: expected a file of torch.save, with little-endian numbers")
    unpickler = Unpickler(file)
    root = unpickler.load()
    keys: list[str] = Unpickler(file).load()
    start = file.tell()
    end = file.seek(0, 2)
    places: dict[str, int] = {}
    for key in keys:  # the storages follow each other, each after the number of its elements
        file.seek(start)
        size = int.from_bytes(file.read(8), "little") * unpickler.storages[key].dtype.itemsize
        places[key] = start + 8
        start += 8 + size
        if start > end or size != unpickler.storages[key].size:
            raise RefusedError("is truncated or damaged: a storage is not as long as its tensors say")

    def read(storage: Storage) -> Tensor:
        file.seek(places[storage.key])
        return read_bytes(file, storage.size)

    return root, read


def read_bytes(file: Any, count: int) -> Tensor:
    """This many bytes from the present position of a file."""
    data = torch.empty(count, dtype=torch.uint8)
    if count and file.readinto(data.numpy()) != count:
        raise RefusedError("is truncated: a storage ends early")
    return data


def tensors_of(state: Any) -> dict[str, TensorRecord]:
    """The named tensors of a dict, without the `module.` of DataParallel; nothing of anything else."""
    # by the method of dict itself: a pickle may give an OrderedDict another one
    items = dict.items(state) if isinstance(state, dict) else ()
    named = {name: value for name, value in items if isinstance(name, str) and isinstance(value, TensorRecord)}
    parallel = all(name.startswith("module.") for name in named)
    return {name.removeprefix("module.") if parallel else name: value for name, value in named.items()}


def state_of(root: Any) -> dict[str, TensorRecord]:
    """The tensors of Lightning's state dict, a bare one, or DDIM's list: state, optimizer, epoch, step (, EMA copies)."""
    if not isinstance(root, list):
        return tensors_of(root["state_dict"] if isinstance(root, dict) and "state_dict" in root else root)
    state, averages = (tensors_of(root[place] if place < len(root) else None) for place in (0, 4))
    copies = ema_names(averages)
    return {**state, **{copies[name]: value for name, value in averages.items()}}


def build(records: dict[str, TensorRecord], read: Reader) -> dict[str, Tensor]:
    """The tensors themselves; what shared a storage in the file shares it in memory."""
    storages: dict[str, Tensor] = {}
    tensors: dict[str, Tensor] = {}
    for name, record in records.items():
        key = record.storage.key
        storages[key] = data = storages[key] if key in storages else read(record.storage)
        if data.numel() != record.storage.size or not fits(record):
            raise RefusedError(f"is damaged: the tensor {name!r} does not lie within its storage")
        place = (data.untyped_storage(), record.offset, record.size, record.stride)
        tensors[name] = torch.empty(0, dtype=record.dtype).set_(*place)
    return tensors


def fits(record: TensorRecord) -> bool:
    """Whether every element lies within the storage; torch would enlarge the storage, with whatever is in memory."""
    numbers = (record.offset, *record.size, *record.stride)
    if len(record.size) != len(record.stride) or not all(isinstance(n, int) and n >= 0 for n in numbers):
        return False
    last = record.offset + sum((n - 1) * step for n, step in zip(record.size, record.stride, strict=True))
    return 0 in record.size or (last + 1) * record.dtype.itemsize <= record.storage.size


def read_pickled(path: Path) -> dict[str, Tensor]:
    """The state dict of a file of `torch.save`; any error at all if it is damaged."""
    with path.open("rb") as file:
        root, read = open_zip(file) if file.peek(4).startswith(b"PK\x03\x04") else open_legacy(file)
        return build(state_of(root), read)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The flat state dict of a `.safetensors` file or, under any other suffix, of a file of `torch.save`.

    Plain tensors on the CPU without gradients. Optimizer states, settings and everything else that is not a tensor of the
    state dict are dropped; their bytes are not read. EMA copies in the list of the DDIM program are named as LDM does:
    `model_ema.` + name without dots.

    Raises:
        FileNotFoundError: no such file.
        ValueError: damaged, not a checkpoint, without tensors, or a pickle that names anything but parts of tensors and
            classes of known training libraries; the message says which.
    """
    if path.stat().st_size == 0:
        raise ValueError(f"{path}: is empty; expected a checkpoint")
    try:
        tensors = load_file(path) if path.suffix == ".safetensors" else read_pickled(path)
    except RefusedError as error:
        raise ValueError(f"{path}: {error}") from error
    except Exception as error:  # damaged bytes fail in whatever way they lead to
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise ValueError(f"{path}: is damaged or no checkpoint of torch.save or safetensors ({reason})") from error
    if not tensors:
        raise ValueError(f"{path}: holds no weights: expected tensors by name, bare or below 'state_dict'")
    return tensors


def ema_names(names: Iterable[str]) -> dict[str, str]:
    """LDM's name for the EMA copy of each parameter; RefusedError if two would have the same."""
    copies = {name: EMA + name.removeprefix("model.").replace(".", "") for name in names}
    if len(set(copies.values())) < len(copies):
        raise RefusedError("two parameters have the same name without dots, so their EMA copies cannot be told apart")
    return copies


def select_weights(tensors: dict[str, Tensor], prefix: str, ema: bool) -> dict[str, Tensor]:
    """The parameters of one network in a checkpoint, by their names below a prefix.

    Args:
        tensors: of `read_tensors`.
        prefix: such as `model.diffusion_model.`; empty for a checkpoint of one network alone.
        ema: the EMA copies that training kept, instead of the last weights.

    Raises:
        ValueError: nothing below the prefix, or no EMA copies of what is there.
    """
    names = [name for name in tensors if name.startswith(prefix) and (prefix or not name.startswith(EMA))]
    if not names:
        present = sorted({name.partition(".")[0] + "." for name in tensors if "." in name})
        raise ValueError(f"no weights below {prefix!r}; the prefixes in this checkpoint are {', '.join(present[:12])}")
    sources = ema_names(names) if ema else {name: name for name in names}
    missing = [name for name in names if sources[name] not in tensors]
    if missing:
        raise ValueError(
            f"no EMA copy ({EMA}*) of {len(missing)} of {len(names)} weights below {prefix!r}, such as {missing[0]!r}; "
            "set ema=false for the weights themselves"
        )
    return {name.removeprefix(prefix): tensors[sources[name]] for name in names}

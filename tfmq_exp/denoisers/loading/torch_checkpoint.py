"""Files of `torch.save`: a zip file, or (before torch 1.6) pickles followed by storages; nothing that they ask for is run."""

import math
import zipfile
from collections.abc import Callable, Iterable, Mapping
from io import BytesIO
from typing import Any, BinaryIO, TypeAlias

import torch
from torch import Tensor

from tfmq_exp.denoisers.loading.torch_pickle import RefusedError, StorageRecord, TensorRecord, load_pickle

LEGACY = (0x1950A86A20F9469CFC6C, 1001)  # magic number and version, as torch.serialization has them
LONGEST_PICKLE = 2**25  # bytes; checkpoints have some hundred for each of some thousand tensors
MOST_DIMENSIONS = 64
ReadStorage: TypeAlias = Callable[[StorageRecord], Tensor]


def open_torch(file: BinaryIO) -> tuple[Any, ReadStorage]:
    """The content of a file, with records in the place of tensors, and a function that reads their storages.

    Raises:
        RefusedError: names of code, more memory or time than a checkpoint needs, or another kind; others, of damaged files.
    """
    length, start = file.seek(0, 2), file.seek(0)
    is_zip = file.read(4) == b"PK\x03\x04"
    file.seek(start)
    return open_zip(file, length) if is_zip else open_legacy(file, length)


def open_zip(file: BinaryIO, length: int) -> tuple[Any, ReadStorage]:
    try:
        archive = zipfile.ZipFile(file)
    except zipfile.BadZipFile as error:
        raise RefusedError(f"is truncated or damaged: a zip file without its end ({error})") from error
    infos = archive.infolist()
    records = {info.filename: info for info in infos}
    pickles = [name for name in records if name.count("/") == 1 and name.endswith("/data.pkl")]
    prefix = pickles[0].removesuffix("data.pkl") if pickles else ""
    if len(pickles) != 1 or prefix + "constants.pkl" in records:
        raise RefusedError(f"is {kind_of_zip(records)}; expected a checkpoint of torch.save")
    if any(info.compress_type != zipfile.ZIP_STORED for info in infos):
        raise RefusedError("holds compressed records, which can grow without limit; torch.save never writes them")
    if len(records) < len(infos) or sum(max(info.file_size, info.compress_size) for info in infos) > length:
        raise RefusedError("is damaged: its records share a name, or are together longer than the file")
    if prefix + "byteorder" in records and archive.read(prefix + "byteorder") != b"little":
        raise RefusedError("was saved in another byte order; expected little-endian numbers")
    if records[pickles[0]].file_size > LONGEST_PICKLE:
        raise RefusedError(f"has a pickle of more than {LONGEST_PICKLE} bytes")

    def read(storage: StorageRecord) -> Tensor:
        name = f"{prefix}data/{storage.key}"
        if archive.getinfo(name).file_size != storage.size:
            raise RefusedError(f"is damaged: record {name!r} is not as long as its tensors say")
        with archive.open(name) as record:
            return read_bytes(record, storage.size)

    return load_pickle(BytesIO(archive.read(pickles[0])))[0], read


def kind_of_zip(names: Iterable[str]) -> str:
    files = [name for name in names if not name.endswith("/")]
    if files and all(name.endswith(".npy") for name in files):
        return "a file of arrays of NumPy (.npz)"
    if inside := [name for name in files if name.endswith((".safetensors", ".ckpt", ".pt", ".pth", ".bin"))]:
        return f"a zip archive, in which there is {inside[0][:100]!r}: unpack it, and give that file"
    return "a zip file or a TorchScript program"


def open_legacy(file: BinaryIO, length: int) -> tuple[Any, ReadStorage]:
    pickles = BytesIO(file.read(LONGEST_PICKLE))
    magic, version, machine = (load_pickle(pickles)[0] for _ in range(3))
    if (magic, version) != LEGACY or not machine["little_endian"]:
        raise RefusedError("is not a checkpoint: expected a file of torch.save, with little-endian numbers")
    root, storages = load_pickle(pickles)
    keys: list[str] = load_pickle(pickles)[0]
    if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys):
        raise RefusedError("is damaged: the keys of its storages are no text")
    start, places = pickles.tell(), dict[str, int]()
    for key in keys:  # the storages follow each other, each after the number of its elements
        file.seek(start)
        size = int.from_bytes(file.read(8), "little") * storages[key].dtype.itemsize
        places[key] = start + 8
        start += 8 + size
        if start > length or size != storages[key].size:
            raise RefusedError("is truncated or damaged: a storage is not as long as its tensors say")

    def read(storage: StorageRecord) -> Tensor:
        file.seek(places[storage.key])
        return read_bytes(file, storage.size)

    return root, read


def read_bytes(file: Any, count: int) -> Tensor:
    data = torch.empty(count, dtype=torch.uint8)
    if count and file.readinto(data.numpy()) != count:
        raise RefusedError("is truncated: a storage ends early")
    return data


def build_tensors(records: Mapping[str, TensorRecord], read: ReadStorage, length: int) -> dict[str, Tensor]:
    """Read tensors; those that shared a storage in the file share it in memory.

    None may be larger than the whole file: one number can be any number of elements, and a copy of it would fill the memory.
    """
    storages, tensors = dict[str, Tensor](), dict[str, Tensor]()
    for name, (storage, dtype, offset, size, stride) in records.items():
        if storage.key not in storages:
            storages[storage.key] = read(storage)
        data = storages[storage.key]
        if data.numel() != storage.size or not fits(records[name], length):
            raise RefusedError(f"is damaged: the tensor {name!r} does not lie within its storage")
        tensors[name] = torch.empty(0, dtype=dtype).set_(data.untyped_storage(), offset, size, stride)  # type: ignore[call-overload]
    return tensors


def fits(record: TensorRecord, length: int) -> bool:
    """Whether every element lies within the storage, which torch would enlarge otherwise, and their bytes within `length`."""
    storage, dtype, offset, size, stride = record
    if not all(isinstance(part, tuple) and len(part) <= MOST_DIMENSIONS for part in (size, stride)):
        return False
    if len(size) != len(stride) or not all(isinstance(n, int) and n >= 0 for n in (offset, *size, *stride)):
        return False
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    inside = 0 in size or (last + 1) * dtype.itemsize <= storage.size
    return inside and math.prod(size) * dtype.itemsize <= length

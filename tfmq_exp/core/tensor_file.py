"""Tensors in safetensors with one JSON object in the header."""

import json
import math
import struct
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from tfmq_exp.core.file_kind import unreadable

# Names of types, those first whose tensors stand first in a file.
DTYPES = {
    **{"U64": torch.uint64, "I64": torch.int64, "F64": torch.float64, "F32": torch.float32, "U32": torch.uint32},
    **{"I32": torch.int32, "BF16": torch.bfloat16, "F16": torch.float16, "U16": torch.uint16, "I16": torch.int16},
    **{"I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool},
}


def write_tensor_file(path: Path, tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> None:
    """Write tensors and a header of plain data; equal contents give equal files.

    The bytes are those of `safetensors.torch.save_file`, which wants all tensors in memory: here a mapping may make each when it
    is asked for, twice.
    """
    names, order = {dtype: name for name, dtype in DTYPES.items()}, list(DTYPES.values())
    kinds = {name: (order.index(x.dtype), tuple(x.shape), x.nbytes) for name, x in tensors.items()}
    entries: dict[str, Any] = {"__metadata__": {"header": json.dumps(header, sort_keys=True)}}
    end = 0
    for name, (kind, shape, nbytes) in sorted(kinds.items(), key=lambda item: (item[1][0], item[0])):
        entries[name] = {"dtype": names[order[kind]], "shape": shape, "data_offsets": (end, end := end + nbytes)}
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    with path.open("wb") as file:
        padded = text.ljust(8 * math.ceil(len(text) / 8))
        file.write(struct.pack("<Q", len(padded)) + padded)
        for name in [*entries][1:]:
            file.write(tensors[name].detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)


def read_header(path: Path) -> dict[str, Any]:
    """Read the header alone."""
    return read_tensor_file(path, lambda _: False)[0]


def read_tensor_file(
    path: Path, chosen: Callable[[str], bool] = lambda _: True
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read the header and the tensors of a file of `write_tensor_file`; ValueError, naming it, for any other.

    `chosen` chooses tensors by name.
    """
    try:
        with safe_open(path, framework="pt") as file:
            header = json.loads((file.metadata() or {}).get("header", "{}"))
            tensors = {key: file.get_tensor(key) for key in file.keys() if chosen(key)}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} {unreadable(path, error)}") from error
    if not isinstance(header, dict):
        raise ValueError(f"{path} is no file of this program: its header is no JSON object")
    return header, tensors


class TensorFile(Mapping[str, Tensor]):
    """The tensors of a file of `write_tensor_file`, each of which is read when it is asked for; errors are those of reading it.

    `outlines` are tensors of the same shapes and types on the meta device, `header` is that of the file.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.header = path, read_header(path)
        self.outlines: dict[str, Tensor] = {}
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118
                part = file.get_slice(name)
                if (kind := part.get_dtype()) not in DTYPES:
                    raise ValueError(f"{path} is no file of this program: {name!r:.60} has the type {kind}")
                self.outlines[name] = torch.empty(part.get_shape(), dtype=DTYPES[kind], device="meta")

    def __getitem__(self, name: str) -> Tensor:
        """A copy of a tensor, so that the file does not stay open."""
        if name not in self.outlines:
            raise KeyError(name)
        return read_tensor_file(self.path, name.__eq__)[1][name].clone()

    def __iter__(self) -> Iterator[str]:
        return iter(self.outlines)

    def __len__(self) -> int:
        return len(self.outlines)

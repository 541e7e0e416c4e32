"""Tensors in safetensors with one JSON object in the header."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from tfmq_exp.core.file_kind import unreadable


def write_tensor_file(path: Path, tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> None:
    """Write tensors and a header of plain data; equal contents give equal files."""
    # one entry: safetensors writes several in random order
    save_file(dict(tensors), path, {"header": json.dumps(header, sort_keys=True)})


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

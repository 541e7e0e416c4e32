"""A batch of CIFAR-10's python version, read without running anything the file asks for.

The file is a pickle of a dict with an array, a list of labels and names. A pickle is a program; here the three names that
describe an array stand for plain records, any other name ends the reading, and no name is looked up in a real module.
"""

import io
import pickle
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8

# by which NumPy before 2 (core) and since (_core) pickles an array
ARRAY_NAMES = {
    *(("numpy.core.multiarray", "_reconstruct"), ("numpy._core.multiarray", "_reconstruct")),
    *(("numpy", "ndarray"), ("numpy", "dtype")),
}


class Record:
    """What a pickle says of an array or of its type; nothing is done with it.

    Where there is a `__setstate__`, a pickle sets no attributes: so it cannot change this class for the next file.
    """

    __slots__ = ("arguments", "state")

    def __init__(self, *arguments: Any) -> None:
        self.arguments, self.state = arguments, ()

    def __setstate__(self, state: Any) -> None:
        self.state = state


class BatchUnpickler(pickle.Unpickler):
    """Builds dicts, lists, numbers, strings and `Record`s."""

    def __init__(self, content: bytes) -> None:
        super().__init__(io.BytesIO(content), encoding="bytes")  # Python 2 wrote it: its strings are bytes

    def find_class(self, module: str, name: str, /) -> Any:
        """A record for what describes an array; UnpicklingError for any other name."""
        if (module, name) not in ARRAY_NAMES:
            raise pickle.UnpicklingError(f"refuses to load '{module}.{name}', which is no part of an array")
        return Record


def read_record(path: Path, content: bytes) -> tuple[UInt8[np.ndarray, "images pixels"], list[int]]:
    """Images, a row each, and labels of a batch.

    Raises:
        ValueError: names of code in it, damaged, or not a batch of CIFAR-10; the message says which.
    """
    try:
        batch = BatchUnpickler(content).load()
        return to_array(batch[b"data"]), [int(label) for label in batch[b"labels"]]
    except Exception as error:  # damaged bytes fail in whatever way they lead to
        raise ValueError(f"{path} is no batch of CIFAR-10 ({type(error).__name__}: {error})") from error


def to_array(record: Any) -> UInt8[np.ndarray, "images pixels"]:
    """The array of bytes that a record describes: version, shape, type, column order, contents."""
    _version, shape, kind, by_columns, content = record.state
    if kind.arguments[0] not in (b"u1", "u1"):
        raise ValueError(f"its images are of type {kind.arguments[0]!r}, expected bytes")
    return np.frombuffer(content, dtype=np.uint8).reshape(shape, order="F" if by_columns else "C")

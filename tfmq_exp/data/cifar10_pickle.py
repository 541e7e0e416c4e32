"""A batch of CIFAR-10's python version, a pickle of a dict with an array, labels and names, read without running it."""

from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8

from tfmq_exp.core.safe_pickle import SafeUnpickler

# by which NumPy before 2 (core) and since (_core) pickles an array
ARRAY_NAMES = (
    "numpy.core.multiarray._reconstruct",
    "numpy._core.multiarray._reconstruct",
    "numpy.ndarray",
    "numpy.dtype",
)


class Record:
    """An array or its type as a pickle describes it.

    Where there is a `__setstate__`, a pickle sets no attributes: so it cannot change this class for the next file.
    """

    __slots__ = ("arguments", "state")

    def __init__(self, *arguments: Any) -> None:
        self.arguments, self.state = arguments, ()

    def __setstate__(self, state: Any) -> None:
        self.state = state


class BatchUnpickler(SafeUnpickler):
    """Builds dicts, lists, numbers, strings and `Record`s."""

    refusal = "it is no part of an array"

    def known(self, name: str) -> Any:
        return Record if name in ARRAY_NAMES else None


def read_record(path: Path, content: bytes) -> tuple[UInt8[np.ndarray, "images pixels"], list[int]]:
    """Read the images of a batch, a row each, and their labels.

    Raises:
        ValueError: names of code in it, damaged, or not a batch of CIFAR-10; the message says which.
    """
    try:
        batch = BatchUnpickler(BytesIO(content), encoding="bytes").load()  # Python 2 wrote it: its strings are bytes
        return to_array(batch[b"data"]), [int(label) for label in batch[b"labels"]]
    except Exception as error:  # damaged bytes fail in any way
        raise ValueError(f"{path} is no batch of CIFAR-10 ({type(error).__name__}: {error})") from error


def to_array(record: Any) -> UInt8[np.ndarray, "images pixels"]:
    """The array of bytes that a record describes: version, shape, type, column order, contents."""
    _version, shape, kind, by_columns, content = record.state
    if kind.arguments[0] not in (b"u1", "u1"):
        raise ValueError(f"its images are of type {kind.arguments[0]!r}, expected bytes")
    return np.frombuffer(content, dtype=np.uint8).reshape(shape, order="F" if by_columns else "C")

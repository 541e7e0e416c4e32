"""Images in guided-diffusion's sample files: `arr_0` in a `.npz`, uint8, (N, H, W, C), read and written in passing."""

import math
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import UInt8
from torch import Tensor

from tfmq_exp.core.file_kind import HEAD, content_of

MEMBER = "arr_0.npy"
HEADERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
# Photographs are packed to a half, flat drawings to a twentieth; deflate reaches a thousandth, with zeros alone.
PACKED, MUCH = 200, 2**30
SIDE = 4096  # pixels


class Header(NamedTuple):
    """What an array of a `.npz` says of itself."""

    shape: tuple[int, ...]
    fortran: bool
    dtype: np.dtype
    start: int  # of the values, in the uncompressed record


class Member(NamedTuple):
    """An array of uint8 images inside a zip file."""

    count: int
    shape: tuple[int, int, int]  # height, width, channels
    start: int  # of the pixels, in the uncompressed record
    crc32: str
    size: int


@contextmanager
def opened(path: Path) -> Iterator[zipfile.ZipFile]:
    """A `.npz`, for reading.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a file that is damaged or something else; says what, where its first bytes tell.
    """
    with path.open("rb") as file:
        head = file.read(HEAD)
    if not head.startswith(b"PK"):
        what = content_of(head)
        raise ValueError(f"{path} {what or 'is no zip archive'}; expected a .npz of numpy")
    try:
        with zipfile.ZipFile(path) as archive:
            if any(name.endswith("data.pkl") for name in archive.namelist()):
                raise ValueError("it is a file of torch.save, such as torch-fidelity's cache; expected a .npz of numpy")
            yield archive
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    except Exception as error:  # damaged bytes fail in whatever way they lead to
        raise ValueError(f"{path} is damaged ({type(error).__name__}: {error})") from error


def read_header(archive: zipfile.ZipFile, name: str) -> Header:
    """What is said of an array, whose values stay unread; ValueError for what numpy would not write."""
    with archive.open(name) as file:
        version = np.lib.format.read_magic(file)
        if version not in HEADERS:
            raise ValueError(f"{name} is of numpy format {version}")
        try:
            shape, fortran, dtype = HEADERS[version](file)
        except ValueError as error:
            raise ValueError(f"{name} has no header of numpy ({error})") from error
        start = file.tell()
    if dtype.hasobject:
        raise ValueError(f"{name} holds Python objects, which are not read: a pickle is a program")
    if archive.getinfo(name).file_size - start != math.prod(shape) * dtype.itemsize or min(shape, default=0) < 0:
        raise ValueError(f"{name} is not as long as its shape {shape} says")
    return Header(shape, fortran, dtype, start)


def find_images(path: Path) -> Member | None:
    """What the header of `arr_0` says; None if the file has none.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a `.npz`, or `arr_0` is no array of uint8 images, or of none, or of such as fill the memory.
    """
    with opened(path) as archive:
        if MEMBER not in archive.namelist():
            return None
        shape, fortran, dtype, start = read_header(archive, MEMBER)
        info = archive.getinfo(MEMBER)
        if dtype != np.uint8 or len(shape) != 4 or fortran or shape[3] not in (1, 3):
            raise ValueError(f"arr_0 is {dtype} {shape}; expected uint8 images (N, height, width, 1 or 3)")
        if 0 in shape:
            raise ValueError(f"arr_0 {shape} holds no images")
        if max(shape[1:3]) > SIDE:
            raise ValueError(f"arr_0 holds images of {shape[2]}x{shape[1]} pixels; at most {SIDE} a side")
        if info.file_size > max(MUCH, PACKED * info.compress_size):
            raise ValueError(f"arr_0 has {info.compress_size} bytes that unpack to {info.file_size}: no images do")
    return Member(shape[0], (shape[1], shape[2], shape[3]), start, f"{info.CRC:08x}", info.file_size)


class NpzImages:
    """The images of such a file as a source: guided-diffusion's samples and reference batches, or what `write_npz` wrote.

    Raises:
        FileNotFoundError: no such file.
        ValueError: no images in it.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        member = find_images(self.path)
        if member is None:
            raise ValueError(f"{path} holds no images: there is no arr_0 in it")
        self.member = member

    def __len__(self) -> int:
        return self.member.count

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height, width."""
        height, width, channels = self.member.shape
        return channels, height, width

    @property
    def identity(self) -> Mapping[str, Any]:
        """File name, count, and the checksum that the zip file has of its pixels."""
        return {"file": self.path.name, "images": len(self), "crc32": self.member.crc32, "bytes": self.member.size}

    def batches(self, size: int) -> Iterator[UInt8[Tensor, "batch channels height width"]]:
        """All of them, `size` at a time.

        Raises:
            ValueError: the file is damaged.
        """
        each = math.prod(self.member.shape)
        with opened(self.path) as archive, archive.open(MEMBER) as file:
            file.read(self.member.start)
            for start in range(0, len(self), size):
                rows = min(size, len(self) - start)
                data = bytearray(file.read(rows * each))
                if len(data) != rows * each:
                    raise ValueError(f"arr_0 ends in image {start + len(data) // each}")
                images = torch.frombuffer(data, dtype=torch.uint8).view(rows, *self.member.shape)
                yield images.permute(0, 3, 1, 2).contiguous()


def write_npz(
    path: Path,
    count: int,
    shape: tuple[int, int, int],
    shards: Iterable[UInt8[Tensor, "batch channels height width"]],
) -> None:
    """Write `arr_0` alone, as images come: if a sample file has statistics, guided-diffusion's evaluator reads only them.

    Args:
        path: the file, which is made anew.
        count: how many images will come.
        shape: their channels, height, width.
        shards: the images.

    Raises:
        ValueError: other images came than were announced.
    """
    channels, height, width = shape
    header = {"descr": "|u1", "fortran_order": False, "shape": (count, height, width, channels)}
    written = 0
    # without a time of day: the same images, the same bytes
    with zipfile.ZipFile(path, "w") as archive, archive.open(zipfile.ZipInfo(MEMBER), "w", force_zip64=True) as file:
        np.lib.format.write_array_header_1_0(file, header)
        for images in shards:
            if images.dtype is not torch.uint8 or tuple(images.shape[1:]) != shape:
                raise ValueError(f"expected uint8 images {shape}, got {images.dtype} {tuple(images.shape[1:])}")
            file.write(images.permute(0, 2, 3, 1).contiguous().numpy().tobytes())
            written += len(images)
        if written != count:
            raise ValueError(f"expected {count} images, got {written}")

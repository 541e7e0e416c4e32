"""guided-diffusion's `.npz` files: images in `arr_0`, statistics in `mu`, `sigma` (pooled), `mu_s`, `sigma_s` (spatial).

Headers are checked before values are read, and Python objects are refused.
"""

import math
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from jaxtyping import UInt8
from torch import Tensor

from tfmq_exp.core.file_kind import HEAD, content_of
from tfmq_exp.evaluation.metrics import GaussianStatistics

IMAGES = "arr_0.npy"
STATISTICS = ("mu", "sigma", "mu_s", "sigma_s")
HEADERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
# Photographs are packed to a half, flat drawings to a twentieth; deflate reaches a thousandth, with zeros alone.
MAX_RATIO, UNCHECKED_BYTES = 200, 2**30
MAX_SIDE = 4096  # pixels
ROUNDING = 1e-5  # of the largest eigenvalue: as far below 0 as float32 may take another
Header = tuple[tuple[int, ...], bool, np.dtype]  # shape, whether in Fortran's order, type


@contextmanager
def open_npz(path: Path) -> Iterator[zipfile.ZipFile]:
    """Open a `.npz` for reading; ValueErrors name the file, also those of the block, and the kind of another file."""
    with path.open("rb") as file:
        head = file.read(HEAD)
    if not head.startswith(b"PK"):
        raise ValueError(f"{path} {content_of(head) or 'is no zip archive'}; expected a .npz of numpy")
    try:
        with zipfile.ZipFile(path) as archive:
            if any(name.endswith("data.pkl") for name in archive.namelist()):
                raise ValueError("it is a file of torch.save, such as torch-fidelity's cache; expected a .npz of numpy")
            yield archive
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    except Exception as error:  # damaged bytes can raise anything
        raise ValueError(f"{path} is damaged ({type(error).__name__}: {error})") from error


@contextmanager
def open_array(archive: zipfile.ZipFile, name: str) -> Iterator[tuple[IO[bytes], Header]]:
    """Open an array at its values, behind its header; ValueError for one that numpy would not write."""
    with archive.open(name) as file:
        version = np.lib.format.read_magic(file)
        if version not in HEADERS:
            raise ValueError(f"{name} is of numpy format {version}")
        try:
            shape, fortran, dtype = HEADERS[version](file)
        except ValueError as error:
            raise ValueError(f"{name} has no header of numpy ({error})") from error
        if dtype.hasobject:
            raise ValueError(f"{name} holds Python objects, which are not read: a pickle is a program")
        size = archive.getinfo(name).file_size - file.tell()
        if size != math.prod(shape) * dtype.itemsize or min(shape, default=0) < 0:
            raise ValueError(f"{name} is not as long as its shape {shape} says")
        yield file, (shape, fortran, dtype)


def has_images(path: Path) -> bool:
    """Whether a `.npz` has `arr_0`."""
    with open_npz(path) as archive:
        return IMAGES in archive.namelist()


class NpzImages:
    """The images of a `.npz` as an image dataset: guided-diffusion's samples and reference batches."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not has_images(self.path):
            raise ValueError(f"{path} holds no images: there is no arr_0 in it")
        with open_npz(self.path) as archive, open_array(archive, IMAGES) as (_, (shape, fortran, dtype)):
            info = archive.getinfo(IMAGES)
            if dtype != np.uint8 or len(shape) != 4 or fortran or shape[3] not in (1, 3):
                raise ValueError(f"arr_0 is {dtype} {shape}; expected uint8 images (N, height, width, 1 or 3)")
            if 0 in shape:
                raise ValueError(f"arr_0 {shape} holds no images")
            if max(shape[1:3]) > MAX_SIDE:
                raise ValueError(f"arr_0 holds images of {shape[2]}x{shape[1]} pixels; at most {MAX_SIDE} a side")
            if info.file_size > max(UNCHECKED_BYTES, MAX_RATIO * info.compress_size):
                raise ValueError(f"arr_0 has {info.compress_size} bytes that unpack to {info.file_size}: no images do")
        self.count, height, width, channels = shape
        self.shape = (channels, height, width)
        content = {"crc32": f"{info.CRC:08x}", "bytes": info.file_size}
        self.identity: Mapping[str, Any] = {"file": self.path.name, "images": self.count, **content}

    def __len__(self) -> int:
        return self.count

    def batches(self, size: int) -> Iterator[UInt8[Tensor, "batch channels height width"]]:
        """Read all images, `size` at a time; ValueError for a damaged file."""
        (channels, *sides), each = self.shape, math.prod(self.shape)
        with open_npz(self.path) as archive, open_array(archive, IMAGES) as (file, _):
            for start in range(0, self.count, size):
                rows = min(size, self.count - start)
                data = bytearray(file.read(rows * each))
                if len(data) != rows * each:
                    raise ValueError(f"arr_0 ends in image {start + len(data) // each}")
                images = torch.frombuffer(data, dtype=torch.uint8).view(rows, *sides, channels)
                yield images.permute(0, 3, 1, 2).contiguous()


def write_npz(
    path: Path, count: int, shape: tuple[int, int, int], shards: Iterable[UInt8[Tensor, "batch channels height width"]]
) -> None:
    """Write images as `arr_0`, as they come; ValueError for others than `count` of a shape (channels, height, width).

    Alone: if a sample file has statistics, guided-diffusion's evaluator reads only them.
    """
    channels, height, width = shape
    header = {"descr": "|u1", "fortran_order": False, "shape": (count, height, width, channels)}
    written = 0
    # without a time of day: the same images, the same bytes
    with zipfile.ZipFile(path, "w") as archive, archive.open(zipfile.ZipInfo(IMAGES), "w", force_zip64=True) as file:
        np.lib.format.write_array_header_1_0(file, header)
        for images in shards:
            if images.dtype is not torch.uint8 or tuple(images.shape[1:]) != shape:
                raise ValueError(f"expected uint8 images {shape}, got {images.dtype} {tuple(images.shape[1:])}")
            file.write(images.permute(0, 2, 3, 1).contiguous().numpy().tobytes())
            written += len(images)
        if written != count:
            raise ValueError(f"expected {count} images, got {written}")


def read_statistics(path: Path, widths: tuple[int, int]) -> tuple[GaussianStatistics, GaussianStatistics]:
    """Read mean and covariance of pooled and of spatial features, of these numbers, in float64; ValueError for others."""
    with open_npz(path) as archive:
        found = [name.removesuffix(".npy") for name in archive.namelist()]
        if missing := [key for key in STATISTICS if key not in found]:
            kind = "no statistics of guided-diffusion"
            if set(found) == {"mu", "sigma"}:
                kind = (
                    "statistics of pytorch-fid or clean-fid, whose images are resized otherwise and which have no sFID"
                )
            elif "arr_0" in found:
                kind = "samples without statistics; those of a folder of images come from data=image_folder"
            raise ValueError(f"there is no {', '.join(missing)}, only {', '.join(found[:9])}: {kind}")
        return _gaussian(archive, "", widths[0]), _gaussian(archive, "_s", widths[1])


def _gaussian(archive: zipfile.ZipFile, suffix: str, width: int) -> GaussianStatistics:
    mean = _read_array(archive, f"mu{suffix}", (width,))
    key, matrix = f"sigma{suffix}", _read_array(archive, f"sigma{suffix}", (width, width))
    if not torch.allclose(matrix, matrix.t(), rtol=1e-4, atol=1e-6 * float(matrix.abs().max())):
        raise ValueError(f"{key} is not symmetric: no covariance")
    if (least := float(matrix.diagonal().min())) < 0:
        raise ValueError(f"{key} has a variance of {least:.3g}: no covariance")
    least, most = torch.linalg.eigvalsh((matrix + matrix.t()) / 2)[[0, -1]].tolist()
    if least < -ROUNDING * most:
        raise ValueError(f"{key} has eigenvalues from {least:.3g} to {most:.3g}: no covariance, which has none below 0")
    return GaussianStatistics(mean, matrix)


def _read_array(archive: zipfile.ZipFile, key: str, shape: tuple[int, ...]) -> Tensor:
    with open_array(archive, f"{key}.npy") as (file, (found, fortran, dtype)):
        if found != shape or dtype.kind != "f" or dtype.itemsize < 4:
            raise ValueError(f"{key} is {dtype} {found}; expected float32 or float64 {shape}")
        values = np.frombuffer(file.read(), dtype).reshape(shape, order="F" if fortran else "C").astype(np.float64)
    if not np.isfinite(values).all():
        raise ValueError(f"{key} has values that are not finite")
    return torch.from_numpy(np.ascontiguousarray(values))

"""Statistics in guided-diffusion's format: `mu`, `sigma` of pooled and `mu_s`, `sigma_s` of spatial features in a `.npz`.

The file's images (`arr_0`), where it has any, are a part of what the statistics are of.
"""

import zipfile
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from tfmq_exp.evaluation.metrics.fid import GaussianStatistics
from tfmq_exp.evaluation.npz_images import opened, read_header

KEYS = ("mu", "sigma", "mu_s", "sigma_s")
ROUNDING = 1e-5  # of the largest eigenvalue: as far below 0 as float32 may take another


def read_statistics(path: Path, widths: tuple[int, int]) -> tuple[GaussianStatistics, GaussianStatistics]:
    """Mean and covariance of pooled and of spatial features, in float64. Arrays are read once their headers are right.

    Args:
        path: the file.
        widths: how many features of each kind there must be.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a `.npz`, a key missing, another shape, or values that are no mean and covariance.
    """
    shapes = {
        key: (width, width) if key.startswith("sigma") else (width,)
        for key, width in zip(KEYS, (widths[0], widths[0], widths[1], widths[1]), strict=True)
    }
    with opened(path) as archive:
        check_keys([name.removesuffix(".npy") for name in archive.namelist()])
        mean, covariance, mean_s, covariance_s = (read_array(archive, key, shapes[key]) for key in KEYS)
        for key, matrix in (("sigma", covariance), ("sigma_s", covariance_s)):
            check_covariance(key, matrix)
    return GaussianStatistics(mean, covariance), GaussianStatistics(mean_s, covariance_s)


def check_keys(found: list[str]) -> None:
    """ValueError for a file without all statistics; says whose format it may be."""
    missing = [key for key in KEYS if key not in found]
    if not missing:
        return
    whose = "no statistics of guided-diffusion"
    if set(found) == {"mu", "sigma"}:
        whose = "statistics of pytorch-fid or clean-fid, whose images are resized in another way and which know no sFID"
    elif "arr_0" in found:
        whose = "samples without statistics; those of a folder of images come from data=image_folder"
    raise ValueError(f"there is no {', '.join(missing)}, only {', '.join(found[:9])}: {whose}")


def read_array(archive: zipfile.ZipFile, key: str, shape: tuple[int, ...]) -> Tensor:
    """Finite float64 values; ValueError for another shape, or numbers too coarse or of another kind."""
    name = f"{key}.npy"
    header = read_header(archive, name)
    if header.shape != shape or header.dtype.kind != "f" or header.dtype.itemsize < 4:
        raise ValueError(f"{key} is {header.dtype} {header.shape}; expected float32 or float64 {shape}")
    with archive.open(name) as file:
        values = np.lib.format.read_array(file, allow_pickle=False).astype(np.float64)
    if not np.isfinite(values).all():
        raise ValueError(f"{key} has values that are not finite")
    return torch.from_numpy(np.ascontiguousarray(values))


def check_covariance(key: str, matrix: Tensor) -> None:
    """ValueError for a matrix that is no covariance: not symmetric, or with a direction of negative variance."""
    if not torch.allclose(matrix, matrix.t(), rtol=1e-4, atol=1e-6 * float(matrix.abs().max())):
        raise ValueError(f"{key} is not symmetric: no covariance")
    if float(matrix.diagonal().min()) < 0:
        raise ValueError(f"{key} has a variance of {float(matrix.diagonal().min()):.3g}: no covariance")
    least, most = torch.linalg.eigvalsh((matrix + matrix.t()) / 2)[[0, -1]].tolist()
    if least < -ROUNDING * most:
        raise ValueError(f"{key} has eigenvalues from {least:.3g} to {most:.3g}: no covariance, which has none below 0")

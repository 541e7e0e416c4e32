"""Statistics in guided-diffusion's format: `mu`, `sigma` of pooled and `mu_s`, `sigma_s` of spatial features in a `.npz`.

The file's images (`arr_0`), where it has any, are a part of what the statistics are of.
"""

import zipfile
from pathlib import Path

import numpy as np
import torch

from tfmq_exp.evaluation.moments import Gaussian

KEYS = ("mu", "sigma", "mu_s", "sigma_s")


def read_statistics(path: Path, widths: tuple[int, int]) -> tuple[Gaussian, Gaussian]:
    """Mean and covariance of pooled and of spatial features, in float64.

    Args:
        path: the file.
        widths: how many features of each kind there must be.

    Raises:
        ValueError: not a `.npz`, a key missing, another shape, or values that are no mean and covariance.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            missing = [key for key in KEYS if key not in file.files]
            if missing:
                raise ValueError(f"there is no {', '.join(missing)}, only {', '.join(file.files)}")
            arrays = {key: np.asarray(file[key]) for key in KEYS}
    except (zipfile.BadZipFile, ValueError, EOFError, AttributeError, TypeError) as error:
        raise ValueError(f"{path} holds no statistics of guided-diffusion: {error}") from error
    for key, width in zip(KEYS, (widths[0], widths[0], widths[1], widths[1]), strict=True):
        wanted = (width, width) if key.startswith("sigma") else (width,)
        if arrays[key].shape != wanted or arrays[key].dtype.kind != "f":
            raise ValueError(f"{key} in {path} is {arrays[key].dtype} {arrays[key].shape}; expected floats {wanted}")
        if not np.isfinite(arrays[key]).all():
            raise ValueError(f"{key} in {path} has values that are not finite")
    mean, covariance, mean_s, covariance_s = (torch.as_tensor(arrays[key], dtype=torch.float64) for key in KEYS)
    for key, matrix in (("sigma", covariance), ("sigma_s", covariance_s)):
        if not torch.allclose(matrix, matrix.t(), rtol=1e-4, atol=1e-6 * float(matrix.abs().max())):
            raise ValueError(f"{key} in {path} is not symmetric: no covariance")
    return Gaussian(mean, covariance), Gaussian(mean_s, covariance_s)

"""Distances of images from those that the float model makes of the same noise, one value for each image, by torchmetrics.

Images are uint8. Arithmetic is in float32: in double precision, SSIM takes twenty times as long on a CPU, and differs by
1e-7 on textures, by 1e-3 on flat bright areas that differ by a single step of 255.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, UInt8
from torch import Tensor
from torchmetrics.functional import image as functional

from tfmq_exp.core.finite import NotFiniteError

SIDE = 11  # pixels of the window of SSIM (Wang et al. 2004): a Gaussian of deviation 1.5
SCALES = 5  # of MS-SSIM (Wang et al. 2003), each half as large as the one before
MULTISCALE_SIDE = SIDE * 2 ** (SCALES - 1)  # the smallest side whose last scale has room for the window: 176
Images = UInt8[Tensor, "batch channels height width"]
PerImage = Float[Tensor, "batch"]


@dataclass(frozen=True)
class PerceptualDistance:
    """A distance of features of two images, such as LPIPS; lower is more alike."""

    name: str
    measure: Callable[[Images, Images], PerImage]
    identity: dict[str, Any]  # all that values depend on: plain JSON data


def signal_noise_ratios(images: Images, exact: Images) -> PerImage:
    """PSNR of each image in dB: 10 log10(255^2 / mean squared difference).

    Equal images get the largest value that two different images of bytes can have, as if one value differed by one: a
    mean over images and differences of methods stay finite.
    """
    found = functional.peak_signal_noise_ratio(
        images.float(), exact.float(), data_range=255.0, reduction="none", dim=(1, 2, 3)
    )
    return found.clamp(max=10 * math.log10(255**2 * exact[0].numel()))


def structural_similarities(images: Images, exact: Images) -> PerImage:
    """SSIM of each image (Wang et al. 2004), K1 = 0.01, K2 = 0.03: mean over channels and pixels, the border's mirrored.

    That is torchmetrics' mean. The authors' program and scikit-image leave out five pixels along the border: at 256x256 a
    small difference, and a large one at 16x16.
    """
    found: Any = functional.structural_similarity_index_measure(
        _unit(images), _unit(exact), data_range=1.0, reduction="none", kernel_size=SIDE
    )
    return found.reshape(len(images))


def multiscale_similarities(images: Images, exact: Images) -> PerImage:
    """MS-SSIM of each image (Wang et al. 2003), of sides from `MULTISCALE_SIDE` pixels."""
    found = functional.multiscale_structural_similarity_index_measure(
        _unit(images), _unit(exact), data_range=1.0, reduction="none", kernel_size=SIDE, normalize="relu"
    )
    return found.reshape(len(images))


@torch.no_grad()
def image_distances(
    images: Images, exact: Images, perceptual: Sequence[PerceptualDistance] = ()
) -> dict[str, PerImage]:
    """Every distance that the size of the images allows, by name, on the CPU.

    Raises:
        ValueError: no uint8 images, or two batches of different shapes.
        NotFiniteError: a value that is not finite.
    """
    if images.dtype is not torch.uint8 or exact.dtype is not torch.uint8 or images.shape != exact.shape:
        found = f"{images.dtype} {tuple(images.shape)} and {exact.dtype} {tuple(exact.shape)}"
        raise ValueError(f"expected two batches of uint8 images of the same shape, got {found}")
    distances = {"psnr": signal_noise_ratios(images, exact)}
    if min(images.shape[2:]) >= SIDE:
        distances["ssim"] = structural_similarities(images, exact)
    if min(images.shape[2:]) >= MULTISCALE_SIDE:
        distances["ms_ssim"] = multiscale_similarities(images, exact)
    distances |= {each.name: each.measure(images, exact) for each in perceptual}
    distances = {name: values.float().cpu() for name, values in distances.items()}
    for name, values in distances.items():
        if not bool(values.isfinite().all()):
            raise NotFiniteError(f"{name} of {int((~values.isfinite()).sum())} of {len(values)} images is not finite")
    return distances


def pooled_signal_noise_ratio(values: Iterable[float]) -> float:
    """PSNR of the mean squared error over images of one size, from those of the images, in dB."""
    errors = [10 ** (-value / 10) for value in values]
    return -10 * math.log10(sum(errors) / len(errors))


def signal_noise_ratio(pairs: Iterable[tuple[Images, Images]]) -> float | None:
    """PSNR of the mean squared error over all images of some batches, in dB; None where all images are the same."""
    values, same = list[float](), True
    for images, exact in pairs:
        values += signal_noise_ratios(images, exact).tolist()
        same = same and torch.equal(images, exact)
    return None if same else pooled_signal_noise_ratio(values)


def _unit(images: Images) -> Tensor:
    """Values from 0 to 1."""
    return images.float() / 255

"""Distances of two images against their formulas, written slowly in double precision."""

import math

import numpy as np
import pytest
import scipy.ndimage
import torch
from torch import Tensor

from tests.helpers.evaluation import pictures
from tfmq_exp.core.finite import NotFiniteError
from tfmq_exp.evaluation.image_comparison import ImageComparison
from tfmq_exp.evaluation.image_distances import (
    MULTISCALE_SIDE,
    PerceptualDistance,
    image_distances,
    multiscale_similarities,
    pooled_signal_noise_ratio,
    signal_noise_ratios,
    structural_similarities,
)

WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)  # of MS-SSIM's scales, table of Wang et al. 2003
WINDOW = np.exp(-0.5 * (np.arange(-5, 6) / 1.5) ** 2)
WINDOW /= WINDOW.sum()


def other(images: Tensor, seed: int, most: int = 25) -> Tensor:
    """The images with another amount of noise on each."""
    generator = torch.Generator().manual_seed(seed)
    amount = torch.linspace(1, most, len(images)).view(-1, 1, 1, 1)
    noise = amount * torch.randn(images.shape, generator=generator)
    return (images + noise).round().clamp(0, 255).to(torch.uint8)


def windows(x: np.ndarray) -> np.ndarray:
    """Gaussian mean around every pixel of a channel, which is mirrored beyond its border."""
    return scipy.ndimage.correlate1d(
        scipy.ndimage.correlate1d(x, WINDOW, axis=0, mode="mirror"), WINDOW, axis=1, mode="mirror"
    )


def similarity(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """SSIM and its contrast-structure part, equations 12 and 13 of Wang et al. 2004, of one channel of 0 .. 255."""
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    mx, my = windows(x), windows(y)
    vx, vy, vxy = windows(x * x) - mx**2, windows(y * y) - my**2, windows(x * y) - mx * my
    structure = (2 * vxy + c2) / (vx + vy + c2)
    return structure * (2 * mx * my + c1) / (mx**2 + my**2 + c1), structure


def multiscale(image: np.ndarray, exact: np.ndarray) -> float:
    """Equation 7 of Wang et al. 2003: contrast and structure of five scales, luminance of the last.

    As torchmetrics has it, the border counts in the last scale alone.
    """
    product, x, y = 1.0, image, exact
    for scale, weight in enumerate(WEIGHTS):
        parts = [similarity(a, b) for a, b in zip(x, y, strict=True)]
        found = [part[0] if scale == 4 else part[1][5:-5, 5:-5] for part in parts]
        product *= float(np.mean(found)) ** weight
        if scale < 4:
            x, y = (z.reshape(len(z), z.shape[1] // 2, 2, z.shape[2] // 2, 2).mean((2, 4)) for z in (x, y))
    return product


@pytest.mark.parametrize("channels", [1, 3])
def test_signal_noise_ratio_is_that_of_each_images_own_mean_squared_error(channels: int) -> None:
    exact = pictures(5, 12, 0, channels)
    images = other(exact, 1)
    found = signal_noise_ratios(images, exact)
    for value, image, own in zip(found.tolist(), images.double(), exact.double(), strict=True):
        assert value == pytest.approx(10 * math.log10(255**2 / float((image - own).square().mean())), rel=1e-6)
    error = float((images.double() - exact.double()).square().mean())
    assert pooled_signal_noise_ratio(found.tolist()) == pytest.approx(10 * math.log10(255**2 / error), rel=1e-5)


def test_equal_images_count_as_if_one_value_differed_by_one() -> None:
    exact = pictures(2, 12, 0)
    images = exact.clone()
    images[1, 0, 0, 0] ^= 1
    same, one = signal_noise_ratios(images, exact).tolist()
    assert same == pytest.approx(one, rel=1e-6)
    assert ImageComparison()([(images, exact)]).identical == 1


@pytest.mark.parametrize(("channels", "size"), [(1, 16), (3, 33)])
def test_structural_similarity(channels: int, size: int) -> None:
    exact = pictures(4, size, 0, channels)
    images = other(exact, 1)
    found = structural_similarities(images, exact)
    for value, image, own in zip(found.tolist(), images.double().numpy(), exact.double().numpy(), strict=True):
        channel = [similarity(a, b)[0].mean() for a, b in zip(image, own, strict=True)]
        assert value == pytest.approx(np.mean(channel), abs=2e-5)
    assert found[0] > found[-1] + 0.01


def test_multiscale_similarity() -> None:
    exact = pictures(2, 176, 0)
    images = other(exact, 1, 60)
    found = multiscale_similarities(images, exact)
    for value, image, own in zip(found.tolist(), images.double().numpy(), exact.double().numpy(), strict=True):
        assert value == pytest.approx(multiscale(image, own), abs=5e-5)
    assert found[0] > found[1] + 0.01


def test_each_size_has_the_distances_that_fit_it() -> None:
    sides = {8: {"psnr"}, 11: {"psnr", "ssim"}, MULTISCALE_SIDE - 1: {"psnr", "ssim"}}
    for side, names in {**sides, MULTISCALE_SIDE: {"psnr", "ssim", "ms_ssim"}}.items():
        exact = pictures(1, side, 0, 1)
        assert image_distances(exact, exact).keys() == names


def test_what_cannot_be_compared_is_refused() -> None:
    exact = pictures(2, 12, 0)
    with pytest.raises(
        ValueError, match=r"same shape, got torch.uint8 \(1, 3, 12, 12\) and torch.uint8 \(2, 3, 12, 12\)"
    ):
        image_distances(exact[:1], exact)
    with pytest.raises(ValueError, match="uint8 images"):
        image_distances(exact.float(), exact.float())
    nan = PerceptualDistance("lpips_alex", lambda images, _: torch.full((len(images),), math.nan), {})
    with pytest.raises(NotFiniteError, match="lpips_alex of 2 of 2 images"):
        image_distances(exact, exact, [nan])
    with pytest.raises(ValueError, match="no images to compare"):
        ImageComparison()([])
    with pytest.raises(ValueError, match="images from 2 on have another size"):
        ImageComparison()([(exact, exact), (exact[..., :8], exact[..., :8])])

"""Preparations against their original libraries, values worked out by hand, and plain loops."""

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

from tfmq_exp.data.preparation import (
    AliasedResizeThenCrop,
    CropThenResize,
    HalveThenResizeThenCrop,
    Preparation,
    ResizeThenCrop,
    Unchanged,
    crop_centre,
    resize_as_opencv,
)

SHAPES = [(40, 40), (41, 60), (60, 41), (97, 35), (35, 36), (16, 16), (17, 200), (9, 12)]
EVERY = [CropThenResize(), ResizeThenCrop(), HalveThenResizeThenCrop(), AliasedResizeThenCrop()]


def noise(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def pattern(height: int, width: int) -> np.ndarray:
    rows, columns = np.mgrid[:height, :width]
    return ((rows[..., None] * 53 + columns[..., None] * 31 + np.arange(3) * 97) % 256).astype(np.uint8)


@pytest.mark.parametrize("preparation", EVERY, ids=lambda p: type(p).__name__)
@pytest.mark.parametrize("shape", SHAPES)
def test_every_image_becomes_a_square_of_bytes(shape: tuple[int, int], preparation: Preparation) -> None:
    for size in (16, 31):
        pixels = preparation(Image.fromarray(noise(*shape)), size)
        assert pixels.shape == (size, size, 3)
        assert pixels.dtype == np.uint8


@pytest.mark.parametrize("preparation", [*EVERY, Unchanged()], ids=lambda p: type(p).__name__)
def test_an_image_of_the_right_size_stays_as_it_is(preparation: Preparation) -> None:
    assert np.array_equal(preparation(Image.fromarray(noise(16, 16)), 16), noise(16, 16))


def test_the_larger_part_of_an_odd_margin_is_cut_from_the_end() -> None:
    pixels = noise(5, 8)
    assert np.array_equal(crop_centre(pixels, 5), pixels[:, 1:6])
    assert np.array_equal(crop_centre(pixels, 2), pixels[1:3, 3:5])
    assert np.array_equal(CropThenResize()(Image.fromarray(pixels), 5), pixels[:, 1:6])


def cubic(x: float) -> float:
    """Keys' kernel with a = -1/2."""
    x = abs(x)
    if x < 1:
        return 1.5 * x**3 - 2.5 * x**2 + 1
    return -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2 if x < 2 else 0.0


def slow_bicubic(pixels: np.ndarray, size: int) -> np.ndarray:
    """Both axes of a square, the kernel widened by the factor of reduction."""
    old = len(pixels)
    factor = old / size
    weights = np.zeros((size, old))
    for new in range(size):
        for place in range(old):
            weights[new, place] = cubic((place + 0.5 - (new + 0.5) * factor) / max(factor, 1))
    weights /= weights.sum(1, keepdims=True)
    across = np.einsum("nx,yxc->ync", weights, pixels.astype(float)).round().clip(0, 255)
    return np.einsum("ny,yxc->nxc", weights, across).clip(0, 255)


@pytest.mark.parametrize("shape", [(40, 40), (41, 60), (97, 35)])
def test_lsun_is_cropped_and_then_resized_by_the_bicubic_kernel(shape: tuple[int, int]) -> None:
    pixels, short = noise(*shape), min(shape)
    top, left = (shape[0] - short) // 2, (shape[1] - short) // 2
    expected = slow_bicubic(pixels[top : top + short, left : left + short], 16)
    found = CropThenResize("bicubic")(Image.fromarray(pixels), 16)
    assert np.abs(found - expected).max() <= 1
    other = CropThenResize("bilinear")(Image.fromarray(pixels), 16)
    assert np.abs(other - expected).max() > 10


@pytest.mark.parametrize("shape", SHAPES)
def test_resizing_before_cropping_is_what_torchvision_does(shape: tuple[int, int]) -> None:
    image = Image.fromarray(noise(*shape))
    modes = v2.InterpolationMode.BILINEAR, v2.InterpolationMode.BICUBIC
    for ours, mode in zip((ResizeThenCrop(), ResizeThenCrop("bicubic")), modes, strict=True):
        for size in (16, 29):
            theirs = v2.Compose([v2.Resize(size, mode), v2.CenterCrop(size)])(image)
            assert np.array_equal(ours(image, size), np.asarray(theirs)), (ours, size)


def halved(pixels: np.ndarray) -> np.ndarray:
    """Means of two columns and then of two rows, each rounded up at a half."""
    columns = (pixels[:, ::2].astype(int) + pixels[:, 1::2] + 1) // 2
    return (columns[::2] + columns[1::2] + 1) // 2


def test_images_are_halved_as_long_as_they_are_twice_the_size() -> None:
    pixels = noise(64, 96)
    once = HalveThenResizeThenCrop()(Image.fromarray(pixels), 32)
    assert np.array_equal(once, halved(pixels)[:, 8:40])
    twice = HalveThenResizeThenCrop()(Image.fromarray(pixels), 16)
    assert np.array_equal(twice, halved(halved(pixels))[:, 4:20])


def test_below_twice_the_size_images_are_only_resized_and_the_crop_comes_last() -> None:
    square = Image.fromarray(noise(63, 63))
    assert np.array_equal(HalveThenResizeThenCrop()(square, 32), CropThenResize()(square, 32))
    wide = Image.fromarray(noise(48, 75))
    expected = np.asarray(wide.resize((50, 32), Image.Resampling.BICUBIC))[:, 9:41]
    assert np.array_equal(HalveThenResizeThenCrop()(wide, 32), expected)


def test_faces_are_reduced_fourfold_to_the_mean_of_the_inner_four_pixels() -> None:
    pixels = noise(64, 64)
    inner = pixels.astype(int).reshape(16, 4, 16, 4, 3)[:, 1:3, :, 1:3].sum((1, 3))
    assert np.array_equal(AliasedResizeThenCrop()(Image.fromarray(pixels), 16), (inner + 2) // 4)


def test_the_long_side_of_a_face_is_rounded_and_cropped() -> None:
    pixels = noise(32, 45)
    expected = resize_as_opencv(pixels, 16, 22)[:, 3:19]  # 22.5 is rounded to even
    assert np.array_equal(AliasedResizeThenCrop()(Image.fromarray(pixels), 16), expected)


# cv2.resize(pattern(5, 7), (width, height), interpolation=cv2.INTER_LINEAR), channels first: the same from OpenCV 4.10 and 5.0
OPENCV = {
    (3, 4): [
        [[29, 83, 138, 192], [118, 172, 226, 24], [206, 89, 69, 113]],
        [[126, 180, 160, 97], [215, 13, 67, 121], [47, 101, 155, 210]],
        [[191, 21, 76, 130], [56, 110, 164, 218], [144, 198, 103, 83]],
    ],
    (6, 9): [
        [
            [0, 20, 45, 69, 93, 117, 141, 165, 186],
            [40, 60, 84, 108, 133, 157, 181, 205, 226],
            [84, 104, 128, 153, 177, 201, 142, 100, 121],
            [128, 149, 173, 197, 221, 162, 79, 37, 58],
            [172, 193, 189, 177, 201, 76, 57, 82, 102],
            [212, 232, 143, 25, 49, 73, 97, 121, 142],
        ],
        [
            [97, 118, 142, 166, 190, 214, 238, 177, 27],
            [137, 157, 181, 205, 230, 104, 86, 89, 67],
            [181, 202, 159, 100, 124, 66, 66, 90, 111],
            [118, 139, 97, 38, 62, 86, 110, 134, 155],
            [13, 34, 58, 82, 106, 130, 154, 179, 199],
            [53, 74, 98, 122, 146, 170, 194, 218, 239],
        ],
        [
            [194, 214, 125, 7, 31, 55, 79, 103, 124],
            [234, 126, 58, 46, 71, 95, 119, 143, 164],
            [128, 78, 67, 91, 115, 139, 163, 187, 208],
            [66, 87, 111, 135, 159, 183, 207, 196, 145],
            [110, 131, 155, 179, 203, 177, 187, 147, 40],
            [150, 170, 195, 219, 243, 68, 35, 59, 80],
        ],
    ],
}


@pytest.mark.parametrize("shape", OPENCV)
def test_resizing_as_opencv_gives_its_bytes(shape: tuple[int, int]) -> None:
    assert resize_as_opencv(pattern(5, 7), *shape).transpose(2, 0, 1).tolist() == OPENCV[shape]


@pytest.mark.parametrize("shape", [(5, 7), (16, 16), (50, 21), (23, 90)])
def test_resizing_as_opencv_is_linear_interpolation_to_one_level(shape: tuple[int, int]) -> None:
    pixels = noise(23, 31)
    real = torch.from_numpy(pixels.transpose(2, 0, 1)[None].astype(np.float64))
    exact = torch.nn.functional.interpolate(real, shape, mode="bilinear", align_corners=False, antialias=False)
    assert np.abs(resize_as_opencv(pixels, *shape) - exact[0].numpy().transpose(1, 2, 0)).max() <= 1


@pytest.mark.parametrize("choice", [CropThenResize, ResizeThenCrop])
def test_unknown_interpolations_are_named_with_the_known_ones(choice: type) -> None:
    with pytest.raises(ValueError, match="must be one of bilinear, bicubic, lanczos, got 'area'"):
        choice("area")

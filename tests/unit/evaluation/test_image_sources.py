"""Sets of images that are compared: what is matched with what, and what cannot be."""

from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor

from tests.helpers.evaluation import pictures
from tfmq_exp.evaluation.image_sources import (
    BATCH_VALUES,
    BatchedImages,
    FolderImages,
    ImageSource,
    batched_pairs,
    matching_indices,
    npz_source,
    read_pairs,
)
from tfmq_exp.evaluation.npz import write_npz


def save(folder: Path, images: dict[str, Tensor]) -> Path:
    for name, image in images.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / name)
    return folder


def in_batches(images: Tensor, size: int, title: str = "a run") -> BatchedImages:
    return BatchedImages(title, len(images), lambda: images.split(size))


def pairs(exact: ImageSource, other: ImageSource) -> tuple[Tensor, Tensor]:
    matching = matching_indices(exact, other)
    found = list(batched_pairs(read_pairs(exact, other, range(len(exact)), matching)))
    images, own = zip(*found, strict=True)
    return torch.cat(images), torch.cat(own)


def test_folders_are_matched_by_name_whatever_the_format(tmp_path: Path) -> None:
    exact, images = pictures(3, 12, 0), pictures(3, 12, 1)
    one = save(tmp_path / "float", {"a.png": exact[0], "b/1.png": exact[1], "c.png": exact[2]})
    # names without suffixes sort otherwise than those with them
    other = save(tmp_path / "quantized", {"a.webp": images[0], "b/1.bmp": images[1], "c.tiff": images[2]})
    Image.fromarray(images[0].permute(1, 2, 0).numpy()).save(other / "a.webp", lossless=True)
    found, own = pairs(FolderImages(one), FolderImages(other))
    assert torch.equal(own, exact)
    assert torch.equal(found, images)


def test_archives_and_batches_are_matched_by_index(tmp_path: Path) -> None:
    exact, images = pictures(7, 12, 0), pictures(7, 12, 1)
    write_npz(tmp_path / "x.npz", 7, (3, 12, 12), [images[:3], images[3:]])
    found, own = pairs(in_batches(exact, 4), npz_source(tmp_path / "x.npz"))
    assert torch.equal(own, exact)
    assert torch.equal(found, images)
    some = list(in_batches(exact, 4).read([1, 3, 4, 6]))
    assert torch.equal(torch.stack(some), exact[[1, 3, 4, 6]])


def test_gray_images_stand_beside_coloured_ones(tmp_path: Path) -> None:
    gray = pictures(2, 12, 0, 1)
    folder = save(tmp_path, {f"{i}.png": image.expand(3, -1, -1) for i, image in enumerate(gray)})
    found, own = pairs(in_batches(gray, 1), FolderImages(folder))
    assert torch.equal(own, found)
    assert own.shape == (2, 3, 12, 12)


def test_images_of_several_sizes_are_compared_in_batches_of_one(tmp_path: Path) -> None:
    sizes = (12, 12, 16, 12)
    images = {f"{i}.png": pictures(1, size, i)[0] for i, size in enumerate(sizes)}
    source = FolderImages(save(tmp_path, images))
    batches = list(batched_pairs(read_pairs(source, source, range(4), range(4))))
    assert [tuple(batch.shape[:3:2]) for batch, _ in batches] == [(2, 12), (1, 16), (1, 12)]


def test_batches_are_bounded() -> None:
    side = int((BATCH_VALUES / 2) ** 0.5)
    image = torch.zeros(1, side, side, dtype=torch.uint8)
    assert [len(batch) for batch, _ in batched_pairs(iter([(image, image)] * 5))] == [2, 2, 1]


def test_what_does_not_match_is_named(tmp_path: Path) -> None:
    images = pictures(4, 12, 0)
    names = {f"{i}.png": image for i, image in enumerate(images)}
    exact = FolderImages(save(tmp_path / "float", names))
    less = FolderImages(save(tmp_path / "less", {"0.png": images[0], "x.png": images[1]}))
    with pytest.raises(ValueError, match=r"3 are in .*float alone, such as 1, 2, 3; 1 are in .*less alone, such as x"):
        matching_indices(exact, less)
    with pytest.raises(ValueError, match=r"float has 4, a run has 3"):
        matching_indices(exact, in_batches(images[:3], 2))
    wide = FolderImages(save(tmp_path / "wide", {**names, "2.png": pictures(1, 16, 0)[0]}))
    with pytest.raises(ValueError, match=r"2 is 12x12 in .*float and 16x16 in .*wide"):
        pairs(exact, wide)
    (tmp_path / "none").mkdir()
    with pytest.raises(ValueError, match="no images in"):
        FolderImages(tmp_path / "none")
    save(tmp_path / "twice", {"0.png": images[0], "0.bmp": images[0]})
    with pytest.raises(ValueError, match="several images of the name 0"):
        FolderImages(tmp_path / "twice")
    with pytest.raises(ValueError, match="a run ends before image 4"):
        list(BatchedImages("a run", 9, lambda: images.split(2)).read([3, 4]))

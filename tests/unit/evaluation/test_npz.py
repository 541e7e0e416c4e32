"""Sample files of guided-diffusion, compared with numpy's own reading and writing."""

import weakref
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.helpers.evaluation import pictures
from tfmq_exp.evaluation.npz import NpzImages, has_images, write_npz


def last(images: Tensor) -> np.ndarray:
    """Channels last, as in the file."""
    return images.permute(0, 2, 3, 1).numpy()


def gathered(source: NpzImages, size: int) -> Tensor:
    batches = list(source.batches(size))
    assert all(len(batch) == size for batch in batches[:-1])
    return torch.cat(batches)


@pytest.mark.parametrize("channels", [1, 3])
def test_numpy_reads_what_we_write(tmp_path: Path, channels: int) -> None:
    images, path = pictures(11, 8, 0, channels), tmp_path / "samples.npz"
    write_npz(path, 11, (channels, 8, 8), images.split([4, 1, 6]))
    with np.load(path, allow_pickle=False) as file:
        assert file.files == ["arr_0"]
        np.testing.assert_array_equal(file["arr_0"], last(images))
    assert torch.equal(gathered(NpzImages(path), 3), images)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_we_read_what_numpy_writes(tmp_path: Path, save: Callable[..., None]) -> None:
    images, path = pictures(7, 6, 0), tmp_path / "samples.npz"
    save(path, last(images), np.arange(7))
    source = NpzImages(path)
    assert (len(source), source.shape) == (7, (3, 6, 6))
    for size in (1, 4, 100):
        assert torch.equal(gathered(source, size), images)


def test_same_images_same_bytes_and_other_images_another_identity(tmp_path: Path) -> None:
    images = pictures(5, 6, 0)
    for name, given, sizes in (("a", images, [5]), ("b", images, [2, 3]), ("c", pictures(5, 6, 1), [5])):
        (tmp_path / name).mkdir()
        write_npz(tmp_path / name / "samples.npz", 5, (3, 6, 6), given.split(sizes))
    a, b, c = (tmp_path / name / "samples.npz" for name in "abc")
    assert a.read_bytes() == b.read_bytes()
    assert NpzImages(a).identity == NpzImages(b).identity
    assert NpzImages(a).identity != NpzImages(c).identity


def test_images_are_not_held_in_memory_together(tmp_path: Path) -> None:
    """What a generator has given is let go before it is asked for the one after the next."""
    given: list[weakref.ref[Tensor]] = []

    def shards() -> Iterator[Tensor]:
        for _ in range(20):
            images = torch.zeros(3, 1, 2, 2, dtype=torch.uint8)
            given.append(weakref.ref(images))
            assert sum(reference() is not None for reference in given) <= 2
            yield images

    write_npz(tmp_path / "samples.npz", 60, (1, 2, 2), shards())
    assert len(NpzImages(tmp_path / "samples.npz")) == 60


@pytest.mark.parametrize(("count", "shape"), [(4, (3, 6, 6)), (6, (3, 6, 6)), (5, (3, 6, 7))])
def test_other_images_than_announced(tmp_path: Path, count: int, shape: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match=r"expected .* got"):
        write_npz(tmp_path / "samples.npz", count, shape, [pictures(5, 6, 0)])


@pytest.mark.parametrize(
    "array",
    [np.zeros((2, 4, 4, 3), np.float32), np.zeros((2, 4, 4), np.uint8), np.zeros((2, 3, 4, 4), np.uint8)],
    ids=["float", "three axes", "channels first"],
)
def test_arrays_that_are_no_images(tmp_path: Path, array: np.ndarray) -> None:
    np.savez(tmp_path / "samples.npz", array)
    with pytest.raises(ValueError, match="expected uint8 images"):
        NpzImages(tmp_path / "samples.npz")


def test_objects_in_a_file_are_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "samples.npz", np.array([[{}]], dtype=object))
    with pytest.raises(ValueError, match="holds Python objects, which are not read"):
        NpzImages(tmp_path / "samples.npz")


def test_files_that_are_damaged_or_something_else(tmp_path: Path) -> None:
    path = tmp_path / "samples.npz"
    with pytest.raises(FileNotFoundError):
        NpzImages(path)
    path.write_bytes(b"PK\x03\x04 no zip file")
    with pytest.raises(ValueError, match="damaged"):
        NpzImages(path)
    np.savez(path, mu=np.zeros(3))
    assert not has_images(path)
    with pytest.raises(ValueError, match="no arr_0"):
        NpzImages(path)
    np.savez(path, last(pictures(5, 16, 0)))
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 255
    path.write_bytes(data)
    with pytest.raises(ValueError, match="damaged"):
        gathered(NpzImages(path), 2)

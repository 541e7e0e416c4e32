"""Statistics of references: of images in one pass, of guided-diffusion's files, and what is wrong with either."""

import dataclasses
import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.helpers.evaluation import TensorDataset, linear_extractor, pictures
from tfmq_exp.evaluation.features import Extractor
from tfmq_exp.evaluation.npz import NpzImages
from tfmq_exp.evaluation.references import NpzReference, ReferenceStatistics, reference_statistics

IMAGES = pictures(30, 6, seed=0)


@pytest.fixture(scope="module")
def extract() -> Extractor:
    return linear_extractor((3, 6, 6), batch_size=7)


def read(reference: Any, extract: Extractor, keep: int = 0) -> ReferenceStatistics:
    return reference_statistics(reference, extract, keep, lambda _done, _of: None)


def statistics_file(path: Path, extract: Extractor, **changes: Any) -> Path:
    """A file as guided-diffusion publishes them, with images; None leaves a key out."""
    features = extract(IMAGES)
    pooled, spatial = features.pooled.double().numpy(), features.spatial.double().numpy()
    arrays = {
        "mu": pooled.mean(0),
        "sigma": np.cov(pooled, rowvar=False),
        "mu_s": spatial.mean(0),
        "sigma_s": np.cov(spatial, rowvar=False),
        "arr_0": IMAGES[:10].permute(0, 2, 3, 1).numpy(),
    }
    np.savez(path, **{name: value for name, value in {**arrays, **changes}.items() if value is not None})
    return path


def same(one: ReferenceStatistics, other: ReferenceStatistics) -> None:
    for part in ("pooled", "spatial"):
        for a, b in zip(getattr(one, part), getattr(other, part), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
    assert torch.equal(one.manifold, other.manifold)


def test_statistics_of_images_are_numpys(extract: Extractor) -> None:
    calls: list[tuple[int, int]] = []
    found = reference_statistics(TensorDataset(IMAGES), extract, 12, lambda done, of: calls.append((done, of)))
    features = extract(IMAGES)
    for gaussian, rows in ((found.pooled, features.pooled), (found.spatial, features.spatial)):
        np.testing.assert_allclose(gaussian.mean, rows.double().numpy().mean(0), rtol=1e-12)
        np.testing.assert_allclose(gaussian.covariance, np.cov(rows.double().numpy(), rowvar=False), rtol=1e-8)
    spread = [0, 2, 5, 7, 10, 12, 15, 17, 20, 22, 25, 27]  # over all 30, which may be ordered by class
    assert torch.equal(found.manifold, features.pooled[spread])
    assert found.shape == (3, 6, 6)
    assert found.provenance == {
        "set": "a test's images",
        "images": 30,
        "pixels_sha256": hashlib.sha256(IMAGES.numpy().tobytes()).hexdigest(),
    }
    assert found.title == "a test's images, 30 images of 6x6"
    assert calls == [(7, 30), (14, 30), (21, 30), (28, 30), (30, 30)]


def test_batches_make_no_difference(extract: Extractor) -> None:
    one, other = (read(TensorDataset(IMAGES), linear_extractor((3, 6, 6), batch_size=size), 12) for size in (1, 30))
    same(one, other)
    assert one.provenance == other.provenance


def test_a_source_that_reads_a_sample_file(tmp_path: Path, extract: Extractor) -> None:
    np.savez(tmp_path / "images.npz", IMAGES.permute(0, 2, 3, 1).numpy())
    found = read(NpzImages(tmp_path / "images.npz"), extract, 12)
    same(found, read(TensorDataset(IMAGES), extract, 12))
    assert found.provenance["pixels_sha256"] == hashlib.sha256(IMAGES.numpy().tobytes()).hexdigest()


def test_statistics_survive_a_file(tmp_path: Path, extract: Extractor) -> None:
    found = read(TensorDataset(IMAGES), extract, 12)
    found.save(tmp_path / "statistics.safetensors")
    loaded = ReferenceStatistics.load(tmp_path / "statistics.safetensors")
    same(found, loaded)
    assert (loaded.shape, loaded.provenance, loaded.title) == (found.shape, found.provenance, found.title)
    (tmp_path / "statistics.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0{}")
    with pytest.raises(ValueError, match=r"statistics\.safetensors is truncated"):
        ReferenceStatistics.load(tmp_path / "statistics.safetensors")


def test_statistics_of_a_published_file(tmp_path: Path, extract: Extractor) -> None:
    path = statistics_file(tmp_path / "VIRTUAL.npz", extract)
    found, expected = read(NpzReference(str(path)), extract, 8), read(TensorDataset(IMAGES), extract)
    assert torch.equal(found.manifold, extract(IMAGES[:8]).pooled)
    same(dataclasses.replace(found, manifold=expected.manifold), expected)
    assert found.shape == (3, 6, 6)
    assert found.provenance["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    assert found.provenance["images_beside_statistics"] == 10
    assert len(read(NpzReference(str(path)), extract, 100).manifold) == 10
    assert len(read(NpzReference(str(path)), extract).manifold) == 0


def test_a_file_without_images_needs_a_word(tmp_path: Path, extract: Extractor) -> None:
    path = str(statistics_file(tmp_path / "VIRTUAL.npz", extract, arr_0=None))
    with pytest.raises(ValueError, match="any_size=true"):
        read(NpzReference(path), extract)
    found = read(NpzReference(path, any_size=True), extract)
    assert found.shape is None
    found.save(tmp_path / "statistics.safetensors")
    assert ReferenceStatistics.load(tmp_path / "statistics.safetensors").shape is None
    assert NpzReference(path).identity != NpzReference(path, any_size=True).identity
    with pytest.raises(ValueError, match="which KID, CMMD, precision and recall need"):
        read(NpzReference(path, any_size=True), extract, keep=5)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"sigma_s": None}, "there is no sigma_s, only mu, sigma, mu_s, arr_0"),
        ({"mu": np.zeros(4)}, r"VIRTUAL\.npz: mu is float64 \(4,\); expected float32 or float64 \(5,\)"),
        ({"sigma": np.zeros((5, 4))}, r"sigma is .* \(5, 4\); expected float32 or float64 \(5, 5\)"),
        ({"sigma": np.zeros((5, 5), int)}, "sigma is int64"),
        ({"mu_s": np.full(7, np.nan)}, "mu_s has values that are not finite"),
        ({"sigma_s": np.triu(np.ones((7, 7)))}, "sigma_s is not symmetric"),
        ({"mu": np.array([{}] * 5)}, "mu.npy holds Python objects, which are not read"),
        ({"arr_0": np.zeros((4, 6, 6), np.uint8)}, "expected uint8 images"),
    ],
)
def test_files_with_something_wrong(tmp_path: Path, extract: Extractor, changes: dict[str, Any], named: str) -> None:
    path = statistics_file(tmp_path / "VIRTUAL.npz", extract, **changes)
    with pytest.raises(ValueError, match=named):
        read(NpzReference(str(path)), extract)


def test_files_that_are_no_statistics(tmp_path: Path, extract: Extractor) -> None:
    with pytest.raises(FileNotFoundError, match="guided-diffusion publishes them"):
        read(NpzReference(str(tmp_path / "nowhere.npz")), extract)
    for name, data, named in (
        ("text.npz", b"hello", "is no zip archive"),
        ("empty.npz", b"", "is empty: download it again"),
    ):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(ValueError, match=rf"{name} {named}; expected a \.npz of numpy"):
            read(NpzReference(str(tmp_path / name)), extract)


class Liar(TensorDataset):
    """Announces more images than there are."""

    def __len__(self) -> int:
        return len(self.images) + 1


def test_sources_that_are_not_what_they_say(extract: Extractor) -> None:
    with pytest.raises(ValueError, match="at least two images, got 1"):
        read(TensorDataset(IMAGES[:1]), extract)
    with pytest.raises(ValueError, match="announces 31 images and gives 30"):
        read(Liar(IMAGES), extract)
    other = TensorDataset(IMAGES)
    other.shape = (3, 8, 8)
    with pytest.raises(ValueError, match=r"announces uint8 images \(3, 8, 8\) and gives torch.uint8 \(3, 6, 6\)"):
        read(other, extract)
    floats: Tensor = IMAGES.float()
    with pytest.raises(ValueError, match=r"gives torch.float32"):
        read(TensorDataset(floats), extract)

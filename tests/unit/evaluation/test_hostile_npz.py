"""Files of statistics that are something else, lie about their size, or hold numbers that are no mean and covariance."""

import gzip
import io
import pickle
import tracemalloc
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.helpers.evaluation import TensorDataset, linear_extractor, pictures
from tfmq_exp.evaluation.features import Extractor
from tfmq_exp.evaluation.npz import NpzImages, read_statistics
from tfmq_exp.evaluation.references import reference_statistics

pytestmark = pytest.mark.bad_input

WIDTHS = (5, 7)


def arrays(**changes: Any) -> dict[str, Any]:
    """Mean and covariance of both kinds, as numpy makes them."""
    rows = [np.random.default_rng(width).normal(size=(40, width)) for width in WIDTHS]
    (mu, sigma), (mu_s, sigma_s) = ((x.mean(0), np.cov(x, rowvar=False)) for x in rows)
    given = {"mu": mu, "sigma": sigma, "mu_s": mu_s, "sigma_s": sigma_s, **changes}
    return {name: value for name, value in given.items() if value is not None}


def saved(write: Callable[[io.BytesIO], Any]) -> bytes:
    file = io.BytesIO()
    write(file)
    return file.getvalue()


def npz(**changes: Any) -> bytes:
    return saved(lambda file: np.savez(file, **arrays(**changes)))


OTHERS = {
    "one array": (saved(lambda f: np.save(f, np.zeros(3))), r"is a \.npy file of NumPy, which holds one array"),
    "a dictionary": (
        saved(lambda f: np.save(f, np.array({"mu": np.zeros(3)}), allow_pickle=True)),
        r"is a \.npy file of NumPy, which holds one array",
    ),
    "a pickle": (pickle.dumps({"mu": np.zeros(3)}), "is a pickle, which is not read"),
    "torch-fidelity's cache": (saved(lambda f: torch.save({"mu": torch.zeros(3)}, f)), r"a file of torch\.save"),
    "gzip": (gzip.compress(npz()), "is a gzip archive: unpack it"),
    "a page": (b"<!DOCTYPE html><html>404", r"is a web page \(HTML\)"),
    "a pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "is a pointer of Git LFS"),
    "nothing": (b"", "is empty"),
    "zeros": (b"\0" * 99, "is no zip archive"),
    "HDF5": (b"\x89HDF\r\n\x1a\n" + b"\0" * 99, "is an HDF5 file"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_files_are_named_as_what_they_are(tmp_path: Path, name: str) -> None:
    content, named = OTHERS[name]
    (tmp_path / "stats.npz").write_bytes(content)
    for read in (lambda path: read_statistics(path, WIDTHS), NpzImages):
        with pytest.raises(ValueError, match=rf"stats\.npz.* {named}.*expected a \.npz"):
            read(tmp_path / "stats.npz")


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"mu_s": None, "sigma_s": None}, "no mu_s, sigma_s, only mu, sigma: statistics of pytorch-fid or clean-fid"),
        ({"sigma": None}, "no sigma, only mu, mu_s, sigma_s: no statistics of guided-diffusion"),
        (
            {**dict.fromkeys(arrays()), "arr_0": np.zeros((2, 4, 4, 3), np.uint8)},
            r"only arr_0: samples without statistics; .* data=image_folder",
        ),
        (dict.fromkeys(arrays()), "there is no mu, sigma, mu_s, sigma_s"),
        ({"sigma": -np.eye(5)}, "sigma has a variance of -1: no covariance"),
        ({"sigma_s": np.diag([1, 1, 1, 1, 1, 1, -1e-12])}, "sigma_s has a variance of -1e-12"),
        ({"sigma": np.eye(5) + 2 * np.eye(5)[::-1]}, "sigma has eigenvalues from -1 to 3: no covariance"),
        ({"sigma": np.full((5, 5), np.nan)}, "sigma has values that are not finite"),
        ({"mu": np.array([0, 0, np.inf, 0, 0])}, "mu has values that are not finite"),
        ({"mu": np.zeros(5, np.float16)}, r"mu is float16 \(5,\); expected float32 or float64"),
        ({"sigma": np.eye(5, dtype=complex)}, "sigma is complex128"),
        ({"sigma": np.array([["a"] * 5] * 5)}, "sigma is <U1"),
        ({"sigma": np.array([[None] * 5] * 5)}, "sigma.npy holds Python objects, which are not read"),
        ({"mu": np.zeros((0,))}, r"mu is float64 \(0,\)"),
        ({"mu": np.float64(3)}, r"mu is float64 \(\)"),
    ],
)
def test_numbers_that_are_no_statistics(tmp_path: Path, changes: dict[str, Any], named: str) -> None:
    (tmp_path / "stats.npz").write_bytes(npz(**changes))
    with pytest.raises(ValueError, match=rf"stats\.npz: .*{named}"):
        read_statistics(tmp_path / "stats.npz", WIDTHS)


@pytest.mark.parametrize("kind", ["<f4", ">f4", "<f8", ">f8", "<f16"])
@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_what_numpy_writes_is_read(tmp_path: Path, kind: str, save: Callable[..., None]) -> None:
    given = {name: value.astype(kind) for name, value in arrays().items()}
    given["sigma"] = np.asfortranarray(given["sigma"])
    save(tmp_path / "stats.npz", **given)
    pooled, spatial = read_statistics(tmp_path / "stats.npz", WIDTHS)
    for found, name in zip((*pooled, *spatial), given, strict=True):
        assert found.dtype is torch.float64
        np.testing.assert_array_equal(found.numpy(), given[name].astype(np.float64))


def test_singular_covariances_of_few_images_are_covariances(tmp_path: Path) -> None:
    """Their least eigenvalues are 0 up to the rounding of whatever type they were stored in."""
    rows = np.random.default_rng(0).normal(size=(3, 400)) * np.geomspace(1, 1e-3, 400)
    for kind in (np.float32, np.float64):
        sigma = np.cov(rows, rowvar=False).astype(kind)
        np.savez(tmp_path / "stats.npz", **arrays(mu=rows.mean(0), sigma=sigma))
        assert torch.equal(
            read_statistics(tmp_path / "stats.npz", (400, 7))[0].covariance, torch.tensor(sigma).double()
        )


def array_file(shape: str, dtype: str = "|u1", content: bytes = b"", order: str = "False") -> bytes:
    """A .npy whose header says whatever is asked for."""
    header = f"{{'descr': '{dtype}', 'fortran_order': {order}, 'shape': {shape}, }}"
    header += " " * (-(len(header) + 11) % 64) + "\n"
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header.encode() + content


def archive(path: Path, members: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for name, content in members.items():
            file.writestr(f"{name}.npy", content)
    return path


@pytest.mark.parametrize(
    ("shape", "content", "named"),
    [
        ("(0, 4, 4, 3)", b"", r"holds no images"),
        ("(2, 0, 4, 3)", b"", r"holds no images"),
        (f"({2**62}, 4, 4, 3)", b"", "not as long as its shape"),
        (f"({2**62}, {2**62}, 4, 3)", b"", "not as long as its shape"),  # whose product is 0 in 64 bits
        (f"({2**64 + 2}, 4, 4, 3)", b"\0" * 96, "not as long as its shape"),  # 2 in 64 bits
        ("(-2, -4, 4, 3)", b"\0" * 96, "not as long as its shape"),
        ("(-1, 4, 4, 3)", b"\0" * 48, "not as long as its shape"),
        ("(2, 4, 4, 3)", b"\0" * 95, "not as long as its shape"),
        ("(2, 4, 4, 3)", b"\0" * 97, "not as long as its shape"),
        ("(2, 4, 4, 4)", b"\0" * 128, "expected uint8 images"),
        ("(1, 1, 5000, 3)", b"\0" * 15000, r"images of 5000x1 pixels; at most 4096"),
        ("(2, 4", b"", "is damaged|header"),
        ("__import__('os')", b"", "is damaged|header"),
        ("(2.0, 4, 4, 3)", b"\0" * 96, "is damaged|shape"),
    ],
)
def test_shapes_of_images_that_cannot_be(tmp_path: Path, shape: str, content: bytes, named: str) -> None:
    path = archive(tmp_path / "images.npz", {"arr_0": array_file(shape, content=content)})
    with pytest.raises(ValueError, match=rf"images\.npz.*({named})"):
        NpzImages(path)


@pytest.mark.parametrize("key", ["mu", "sigma", "mu_s", "sigma_s"])
@pytest.mark.parametrize("shape", [f"({2**62},)", f"({2**31}, {2**33})", "(100000000,)"])
def test_arrays_are_read_once_their_shape_is_right(tmp_path: Path, key: str, shape: str) -> None:
    members = {name: saved(lambda f, x=x: np.save(f, x)) for name, x in arrays().items()}
    content = b"\0" * 800_000 if shape == "(100000000,)" else b""
    path = archive(tmp_path / "stats.npz", members | {key: array_file(shape, "<f8", content)})
    tracemalloc.start()
    with pytest.raises(ValueError, match=rf"stats\.npz: {key}(\.npy)? is "):
        read_statistics(path, WIDTHS)
    assert tracemalloc.get_traced_memory()[1] < 2**20
    tracemalloc.stop()


def test_an_archive_that_unpacks_to_a_terabyte_is_refused_unread(tmp_path: Path) -> None:
    """Written by hand: the directory of the archive says the sizes, which is all that is looked at."""
    path, count = tmp_path / "bomb.npz", 2**40 // (256 * 256 * 3)
    head = array_file(f"({count}, 256, 256, 3)")
    packed = zlib.compress(head + b"\0" * 10**6, 9, wbits=-15)
    archive(path, {"arr_0": head})
    data = bytearray(path.read_bytes())
    size = (len(head) + count * 256 * 256 * 3).to_bytes(8, "little")
    with zipfile.ZipFile(path) as file:
        info = file.getinfo("arr_0.npy")
    assert len(packed) < 10_000
    place = data.rindex(b"PK\x01\x02")  # the entry of the directory: its size becomes that of the extra field
    extra = b"\x01\x00\x08\x00" + size
    data[place + 24 : place + 28] = b"\xff\xff\xff\xff"
    data[place + 30 : place + 32] = len(extra).to_bytes(2, "little")
    name_end = place + 46 + len(info.filename)
    data[name_end:name_end] = extra
    end = data.rindex(b"PK\x05\x06")
    data[end + 12 : end + 16] = (int.from_bytes(data[end + 12 : end + 16], "little") + len(extra)).to_bytes(4, "little")
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"bomb\.npz: arr_0 has \d+ bytes that unpack to \d{13}: no images do"):
        NpzImages(path)


@pytest.mark.parametrize("seed", range(12))
def test_whatever_bit_flips_the_error_is_one_line_that_names_the_file(tmp_path: Path, seed: int) -> None:
    images = pictures(6, 8, 0).permute(0, 2, 3, 1).numpy()
    content = bytearray(saved(lambda f: np.savez_compressed(f, **arrays(arr_0=images))))
    generator = np.random.default_rng(seed)
    for place in generator.integers(0, len(content), 40):
        changed = content.copy()
        changed[place] ^= 1 << int(generator.integers(8))
        (tmp_path / "stats.npz").write_bytes(changed)
        said: list[str] = []
        try:
            read_statistics(tmp_path / "stats.npz", WIDTHS)
            list(NpzImages(tmp_path / "stats.npz").batches(4))
        except ValueError as error:
            said.append(str(error))
        assert all("stats.npz" in text for text in said)


@pytest.mark.parametrize("count", [2, 40, 3000])
@pytest.mark.parametrize("value", [0, 3, 255])
def test_a_reference_of_one_image_many_times_is_refused(count: int, value: int) -> None:
    same = torch.full((count, 3, 6, 6), value, dtype=torch.uint8)
    same[:, :, ::2] //= 2
    with pytest.raises(ValueError, match=rf"all images of the reference \(a test's images, {count} images of 6x6\)"):
        measured(same)


def measured(images: Tensor) -> Any:
    extract: Extractor = linear_extractor((3, 6, 6))
    return reference_statistics(TensorDataset(images), extract, 0, lambda _done, _of: None)


def test_a_reference_whose_images_differ_by_one_grey_level_is_one() -> None:
    images = torch.full((40, 3, 6, 6), 100, dtype=torch.uint8)
    images[::2, 0, 3, 3] += 1
    assert float(measured(images).pooled.covariance.trace()) > 0

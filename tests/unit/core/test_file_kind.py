"""Files that are something else than a checkpoint are named as what they are, with what to do."""

import bz2
import gzip
import io
import json
import lzma
import os
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from tests.helpers.checkpoints import tensor_names
from tfmq_exp.core.file_kind import instead_of_text
from tfmq_exp.core.files import read_json
from tfmq_exp.denoisers.digits import load_denoiser as load_digits
from tfmq_exp.denoisers.loading.checkpoint import read_tensors
from tfmq_exp.denoisers.loading.condition_encoders import read_tokenizer
from tfmq_exp.denoisers.loading.pretrained import load_denoiser, read_architecture
from tfmq_exp.evaluation.features import load_inception

pytestmark = pytest.mark.bad_input

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 4265380512\n"


def archived(write: Callable[[io.BytesIO], None]) -> bytes:
    buffer = io.BytesIO()
    write(buffer)
    return buffer.getvalue()


def zipped(name: str, content: bytes = b"x") -> bytes:
    def write(buffer: io.BytesIO) -> None:
        with zipfile.ZipFile(buffer, "w") as archive:
            archive.writestr(name, content)

    return archived(write)


def tarred(buffer: io.BytesIO) -> None:
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("model.ckpt"))


def whole(buffer: io.BytesIO) -> None:
    torch.save({"a": torch.zeros(10_000)}, buffer)


KINDS: dict[str, tuple[bytes, str]] = {
    "pointer of Git LFS": (POINTER, "git lfs pull"),
    "pointer of Git LFS with a mark": (POINTER.replace(b"\n", b"\r\n"), "git lfs pull"),
    "web page": (b"<!DOCTYPE html><html><title>Virus scan warning</title></html>", "web page (HTML)"),
    "web page after spaces": (b"\xef\xbb\xbf\n\n  <HTML lang=en>", "web page (HTML)"),
    "denial of a bucket": (b'<?xml version="1.0"?>\n<Error><Code>AccessDenied</Code></Error>', "AccessDenied"),
    "XML without its head": (b"<Error><Code>NoSuchKey</Code></Error>", "NoSuchKey"),
    "error of a server": (b'{"error":"Repository not found"}', "Repository not found"),
    "list of errors": (b'[{"message": "Bad credentials"}]', "Bad credentials"),
    "not found": (b"Entry not found", "is text, no checkpoint: it begins 'Entry not found'"),
    "denied": (b"Access to model x is restricted. You must be authenticated.\n", "is text"),
    "archive of a checkpoint": (zipped("sd/model.ckpt"), "'sd/model.ckpt': unpack it"),
    "npz": (archived(lambda b: np.savez(b, mu=np.zeros(3), sigma=np.eye(3))), "arrays of NumPy (.npz)"),
    "npy": (archived(lambda b: np.save(b, np.zeros(3))), ".npy file of NumPy"),
    "zip of something": (zipped("a.txt"), "is a zip file"),
    "empty zip": (b"PK\x05\x06" + bytes(18), "empty zip"),
    "gzip": (gzip.compress(b"x" * 1000), "gzip archive: unpack it"),
    "bzip2": (bz2.compress(b"x" * 1000), "bzip2 archive: unpack it"),
    "xz": (lzma.compress(b"x" * 1000), "xz archive: unpack it"),
    "tar": (archived(tarred), "tar archive: unpack it"),
    "7z": (b"7z\xbc\xaf\x27\x1c\x00\x04" + bytes(100), "7z archive: unpack it"),
    "rar": (b"Rar!\x1a\x07\x01\x00" + bytes(100), "rar archive: unpack it"),
    "zstd": (b"\x28\xb5\x2f\xfd" + bytes(100), "zstd archive: unpack it"),
    "GGUF": (b"GGUF\x03\x00\x00\x00" + bytes(100), "GGUF"),
    "HDF5": (b"\x89HDF\r\n\x1a\n" + bytes(100), "HDF5"),
    "ONNX": (b"\x08\x08\x12\x07pytorch\x1a\x052.1.0" + bytes(100), "ONNX"),
    "Flax": (b"\x82\xa6params\x81\xa7conv_in" + b"\xc8" * 100, "Flax"),
    "LevelDB of TensorFlow": (b"\x01\x02\xff" * 30 + b"\x57\xfb\x80\x8b\x24\x75\x47\xdb", "TensorFlow"),
    "picture": (archived(lambda b: Image.new("RGB", (4, 4)).save(b, "png")), "is a picture"),
    "PDF": (b"%PDF-1.7\n%\xe2\xe3", "is a PDF"),
    "nothing": (b"", "is empty"),
    "zeros": (bytes(4096), "begins with zeros"),
    "half of a zip file": (archived(whole)[:20_000], "is truncated or damaged: a zip file without its end"),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("suffix", ["ckpt", "safetensors", "bin"])
def test_what_it_is_and_what_to_do(kind: str, suffix: str, tmp_path: Path) -> None:
    content, words = KINDS[kind]
    path = tmp_path / f"weights.{suffix}"
    path.write_bytes(content)
    for read in (tensor_names, read_tensors):
        with pytest.raises(ValueError, match=r"\S") as caught:
            read(path)
        message = str(caught.value)
        assert message.startswith(f"{path}: ")
        assert words in message
        assert "\n" not in message
        assert message.isprintable()


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("model.ckpt.part", "a download that has not ended"),
        ("model.safetensors.crdownload", "a download that has not ended"),
        ("5e1f.incomplete", "a download that has not ended"),
        ("flax_model.msgpack", "Flax"),
        ("model.onnx", "ONNX"),
        ("model.ckpt-5000.data-00000-of-00001", "TensorFlow"),
        ("model.ckpt-5000.index", "TensorFlow"),
        ("model.safetensors.index.json", "give the folder that it is in"),
        ("model.safetensors.index.fp16.json", "give the folder that it is in"),
    ],
)
def test_names_tell_where_bytes_do_not(name: str, words: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(bytes(range(200, 255)) * 10)
    with pytest.raises(ValueError, match=words):
        read_tensors(tmp_path / name)


@pytest.mark.parametrize("share", [0.05, 0.5, 0.99])
@pytest.mark.parametrize("suffix", ["ckpt", "safetensors", "safetensors.part"])
def test_a_part_of_safetensors_says_how_much_there_is(share: float, suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"a.{suffix}"
    save_file({f"layer.{i}.weight": torch.zeros(100) for i in range(100)}, path)
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(
        ValueError, match=rf"is truncated: .* bytes and has {int(share * len(content))}: download it again"
    ):
        tensor_names(path)


def test_folders_links_and_pipes(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is a folder; expected a file"):
        read_tensors(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match="no regular file"):  # and is not waited for
        read_tensors(tmp_path / "pipe")
    (tmp_path / "link.ckpt").symlink_to("../blobs/4d7a")
    with pytest.raises(FileNotFoundError, match=r"a link to \.\./blobs/4d7a, which is not there"):
        read_tensors(tmp_path / "link.ckpt")
    (tmp_path / "model.ckpt.crdownload").write_bytes(b"PK")
    with pytest.raises(FileNotFoundError, match=r"there is model\.ckpt\.crdownload, a download that has not ended"):
        read_tensors(tmp_path / "model.ckpt")


def test_every_reader_of_a_given_file_says_so(tmp_path: Path) -> None:
    path = tmp_path / "model.ckpt"
    path.write_bytes(POINTER)
    readers: list[Callable[[], object]] = [
        lambda: load_denoiser("x", path, {"model": {}}, False),
        lambda: load_denoiser("x", path, None, False, sha256="0" * 64),  # before its hash is compared
        lambda: load_digits(str(path)),
        lambda: load_inception(path),
    ]
    for read in readers:
        with pytest.raises(ValueError, match=r"model\.ckpt: is a pointer of Git LFS.*git lfs pull"):
            read()


@pytest.mark.parametrize("content", [POINTER, b"<!DOCTYPE html><html>", b"", b"\x1f\x8b\x08"])
def test_texts_beside_weights_are_named_too(content: bytes, tmp_path: Path) -> None:
    words = instead_of_text(write(tmp_path / "config.json", content)) or ""
    assert words
    for name in ("vocab.json", "merges.txt", "a.yaml"):
        write(tmp_path / name, content)
    readers: list[tuple[str, Callable[[], object]]] = [
        ("config.json", lambda: read_json(tmp_path / "config.json")),
        ("vocab.json", lambda: read_tokenizer(tmp_path)),
        ("a.yaml", lambda: read_architecture(tmp_path / "a.yaml")),
    ]
    for name, read in readers:
        with pytest.raises(ValueError, match=r"\S") as caught:
            read()
        assert str(caught.value) == f"{tmp_path / name} {words}"


def test_a_truncated_configuration_is_damaged(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"config\.json is damaged"):
        read_json(write(tmp_path / "config.json", b'{"a": '))


def write(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def test_weights_of_digits_in_any_format(tmp_path: Path) -> None:
    shipped = load_digits()
    state = shipped.network.state_dict()
    torch.save({"state_dict": state}, tmp_path / "a.safetensors")
    save_file(state, tmp_path / "a.ckpt")
    for name in ("a.safetensors", "a.ckpt"):
        read = load_digits(str(tmp_path / name)).network.state_dict()
        assert all(torch.equal(read[key], value) for key, value in state.items())
    (tmp_path / "a.json").write_text(json.dumps({"a": 1}))
    with pytest.raises(ValueError, match="is JSON"):
        load_digits(str(tmp_path / "a.json"))

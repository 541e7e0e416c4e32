"""Which files of a component's folder are read, and that shards and variants give the tensors of the whole."""

import json
import logging
import os
from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler, UNet2DModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tfmq_exp.denoisers.loading.pretrained import hash_weights, load_denoiser
from tfmq_exp.denoisers.loading.weight_files import read_state, weight_files

pytestmark = pytest.mark.bad_input

STATE = {f"layer.{i}.weight": torch.full((3,), float(i)) for i in range(6)}


def write(path: Path, state: dict[str, Tensor]) -> None:
    if path.suffix == ".bin":
        torch.save(state, path)
    else:
        save_file(state, path)


def in_shards(folder: Path, pattern: str, index: str | None, count: int = 3) -> list[Path]:
    """Files by `pattern`, with `{}` in the place of 00001-of-00003, and the index that names them."""
    names, files = list(STATE), []
    places: dict[str, str] = {}
    for i in range(count):
        part = names[i::count]
        file = folder / pattern.format(f"{i + 1:05}-of-{count:05}")
        write(file, {name: STATE[name] for name in part})
        places |= dict.fromkeys(part, file.name)
        files.append(file)
    if index:
        (folder / index).write_text(json.dumps({"metadata": {"total_size": 72}, "weight_map": places}))
    return files


LAYOUTS = [
    ("diffusion_pytorch_model-{}.safetensors", "diffusion_pytorch_model.safetensors.index.json"),
    ("diffusion_pytorch_model-{}.bin", "diffusion_pytorch_model.bin.index.json"),
    ("diffusion_pytorch_model.fp16-{}.safetensors", "diffusion_pytorch_model.safetensors.index.fp16.json"),
    ("diffusion_pytorch_model.fp16-{}.safetensors", "diffusion_pytorch_model.safetensors.fp16.index.json"),
    ("diffusion_pytorch_model-{}.fp16.safetensors", "diffusion_pytorch_model.fp16.safetensors.index.json"),
    ("model.bf16-{}.safetensors", "model.safetensors.index.bf16.json"),
    ("model-{}.safetensors", "model.safetensors.index.json"),
    ("pytorch_model-{}.bin", "pytorch_model.bin.index.json"),
    ("pytorch_model.fp16-{}.bin", None),
    ("model-{}.safetensors", None),
]


@pytest.mark.parametrize(("pattern", "index"), LAYOUTS)
def test_shards_are_the_whole(pattern: str, index: str | None, tmp_path: Path) -> None:
    files = in_shards(tmp_path, pattern, index)
    assert weight_files(tmp_path) == files
    found = read_state(tmp_path)
    assert found.keys() == STATE.keys()
    assert all(torch.equal(found[name], value) for name, value in STATE.items())
    for file in files:
        content = file.read_bytes()
        file.unlink()
        with pytest.raises(FileNotFoundError, match=rf"lacks {file.name}, 1 of 3 shards"):
            weight_files(tmp_path)
        file.write_bytes(content)


def test_what_is_read_of_several(tmp_path: Path) -> None:
    """Removing what was read each time, down to the last."""
    order = [
        "diffusion_pytorch_model.safetensors",
        "model.safetensors",
        "diffusion_pytorch_model.bin",
        "pytorch_model.bin",
        "diffusion_pytorch_model.fp32.safetensors",
        "diffusion_pytorch_model.fp16.safetensors",
        "diffusion_pytorch_model.fp16.bin",
        "diffusion_pytorch_model.bf16.safetensors",
        "diffusion_pytorch_model.non_ema.safetensors",
    ]
    for name in (*order, "openvino_model.bin", "pytorch_lora_weights.safetensors", "x.safetensors", "optimizer.bin"):
        write(tmp_path / name, STATE)
    for name in order:
        assert weight_files(tmp_path) == [tmp_path / name]
        (tmp_path / name).unlink()
    with pytest.raises(FileNotFoundError, match=r"expected diffusion_pytorch_model\.safetensors or model\.safe"):
        weight_files(tmp_path)


@pytest.mark.parametrize("name", ["flax_model.msgpack", "diffusion_pytorch_model.safetensors.part", "model.onnx"])
def test_what_lies_there_instead_is_named(name: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / name).write_bytes(b"\xdf\xff" * 20)
    with pytest.raises(FileNotFoundError, match=f"no weights in .*; there is {name}, which (holds|is)"):
        weight_files(tmp_path)


@pytest.mark.parametrize(
    "content",
    [
        "version https://git-lfs.github.com/spec/v1\n",
        "{",
        "[]",
        "{}",
        '{"weight_map": []}',
        '{"weight_map": {}}',
        '{"weight_map": {"a": 3}}',
        '{"weight_map": {"a": "../model.safetensors"}}',
        '{"weight_map": {"a": "/etc/passwd"}}',
        '{"weight_map": {"a": "config.json"}}',
        '{"weight_map": {"a": ["x"]}}',
        "[" * 100_000,
    ],
)
def test_an_index_that_is_none(content: str, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(content)
    with pytest.raises(ValueError, match=r"model\.safetensors\.index\.json (is|holds)"):
        weight_files(tmp_path)


def test_a_weight_in_two_shards_is_refused(tmp_path: Path) -> None:
    files = in_shards(tmp_path, "model-{}.safetensors", None)
    write(files[1], STATE)
    with pytest.raises(ValueError, match=r"model-00002-of-00003\.safetensors: layer\.0\.weight is in another shard"):
        read_state(tmp_path)


@pytest.fixture
def folder(tiny_unet: nn.Module, tmp_path: Path) -> Path:
    assert isinstance(tiny_unet, UNet2DModel)
    tiny_unet.save_pretrained(tmp_path / "model" / "unet")
    DDIMScheduler().save_pretrained(tmp_path / "model" / "scheduler")
    return tmp_path / "model"


def test_a_variant_alone_is_read_and_said(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    whole = folder / "unet" / "diffusion_pytorch_model.safetensors"
    state, digest = load_file(whole), hash_weights(folder)
    for variant, dtype in (("fp16", torch.float16), ("bf16", torch.bfloat16)):
        file = whole.with_name(f"diffusion_pytorch_model.{variant}.safetensors")
        write(file, {name: value.to(dtype) for name, value in state.items()})
        assert hash_weights(folder) == digest  # it is not read while there is the whole
        content = whole.read_bytes()
        whole.unlink()
        with caplog.at_level(logging.INFO):
            found = load_denoiser("x", folder, None, False)
        assert f"unet has weights of the variant {variant} alone: {file.name}" in caplog.text
        assert found.weights_sha256 != digest
        read = found.network.state_dict()
        assert all(torch.equal(read[name], value.to(dtype).float()) for name, value in state.items())
        assert all(parameter.dtype is torch.float32 for parameter in found.network.parameters())
        file.unlink()
        whole.write_bytes(content)


def test_diffusers_own_shards(folder: Path, tiny_unet: nn.Module) -> None:
    """As `save_pretrained` writes them, whole and of a variant; the hash covers every shard."""
    whole = load_denoiser("x", folder, None, False)
    (folder / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    assert isinstance(tiny_unet, UNet2DModel)
    for variant in (None, "fp32"):
        tiny_unet.save_pretrained(folder / "unet", max_shard_size="200KB", variant=variant)
        shards = weight_files(folder / "unet")
        assert len(shards) > 1
        sharded = load_denoiser("x", folder, None, False)
        expected = whole.network.state_dict()
        assert all(torch.equal(value, expected[name]) for name, value in sharded.network.state_dict().items())
        state = load_file(shards[-1])
        write(shards[-1], {name: value + 1 for name, value in state.items()})
        assert hash_weights(folder) != sharded.weights_sha256
        shards[0].unlink()
        with pytest.raises(FileNotFoundError, match=f"unet lacks {shards[0].name}"):
            load_denoiser("x", folder, None, False)
        for file in (folder / "unet").glob("diffusion*"):
            file.unlink()


def test_a_pointer_in_a_folder_is_named(folder: Path) -> None:
    file = folder / "unet" / "diffusion_pytorch_model.safetensors"
    file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 3\n")
    with pytest.raises(ValueError, match=rf"^{file}: is a pointer of Git LFS"):
        load_denoiser("x", folder, None, False)


@pytest.mark.parametrize("name", ["diffusion_pytorch_model.safetensors", "diffusion_pytorch_model-00001-of-00001.bin"])
def test_what_is_no_file_is_not_opened(name: str, folder: Path) -> None:
    """A pipe waits for ever, a device never ends."""
    (folder / "unet/diffusion_pytorch_model.safetensors").unlink()
    file = folder / "unet" / name
    os.mkfifo(file)
    with pytest.raises(ValueError, match=rf"{file} is no regular file"):
        load_denoiser("x", folder, None, False)
    file.unlink()
    file.symlink_to("/dev/zero")
    with pytest.raises(ValueError, match=rf"{file} is no regular file"):
        load_denoiser("x", folder, None, False)
    file.unlink()
    file.mkdir()
    with pytest.raises(ValueError, match=rf"{file} is a folder; expected a file"):
        load_denoiser("x", folder, None, False)


def test_a_link_of_a_cache_that_leads_nowhere(folder: Path) -> None:
    file = folder / "unet/diffusion_pytorch_model.safetensors"
    file.unlink()
    file.symlink_to("../../blobs/0a1b")
    with pytest.raises(
        FileNotFoundError, match=rf"no weights at {file} \(it is a link to \.\./\.\./blobs/0a1b, which is not"
    ):
        load_denoiser("x", folder, None, False)

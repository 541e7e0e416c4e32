"""Weights that are not finite are refused when they are read: the message names the file, the network and the tensor."""

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from diffusers import DDIMScheduler
from safetensors.torch import load_file, save_file
from torch import nn

from tests.helpers.originals import read_original
from tfmq_exp.denoisers.digits import WEIGHTS, load_classifier
from tfmq_exp.denoisers.digits import load_denoiser as load_digits
from tfmq_exp.denoisers.loading.pretrained import load_denoiser

pytestmark = pytest.mark.bad_input

WRONG = [math.nan, math.inf, -math.inf]


def spoiled(path: Path, name: str, value: float, target: Path) -> Path:
    tensors = load_file(path)
    tensors[name] = tensors[name].clone()
    tensors[name].view(-1)[-1] = value
    save_file(tensors, target)
    return target


@pytest.mark.parametrize("value", WRONG)
@pytest.mark.parametrize(("file", "load"), [("denoiser", load_digits), ("classifier", load_classifier)])
def test_shipped_networks(file: str, load: Callable[[str], Any], value: float, tmp_path: Path) -> None:
    name = sorted(load_file(WEIGHTS / f"{file}.safetensors"))[-1]
    path = spoiled(WEIGHTS / f"{file}.safetensors", name, value, tmp_path / "w.safetensors")
    with pytest.raises(ValueError, match=rf"w\.safetensors: the weights: {name} is not finite: 1 "):
        load(str(path))


PLACES = [
    ("ddim_cifar10", "", "unet"),
    ("ldm_lsun_beds", "model.diffusion_model.", "unet"),
    ("ldm_lsun_beds", "first_stage_model.decoder.", "first_stage"),
    ("ldm_lsun_churches", "first_stage_model.encoder.", "first_stage"),
    ("ldm_cin256_v2", "cond_stage_model.", "class embedding"),
    ("sd_v1", "cond_stage_model.transformer.", "text_encoder"),
    ("sd_v1", "model.diffusion_model.", "unet"),
]


@pytest.mark.parametrize(("name", "prefix", "part"), PLACES)
def test_original_checkpoints(name: str, prefix: str, part: str, tmp_path: Path, tokenizer: Path) -> None:
    original = read_original(name)
    key = next(k for k, v in original.state.items() if k.startswith(prefix) and v.is_floating_point() and v.dim() > 1)
    original.state[key] = original.state[key].clone()
    original.state[key].view(-1)[0] = math.nan
    path = original.save(tmp_path / "model.ckpt")
    with pytest.raises(ValueError, match=rf"model\.ckpt: the weights of (the )?{part}.* is not finite: 1 NaN of"):
        load_denoiser(name, path, original.config, False, tokenizer)


@pytest.mark.parametrize("value", WRONG)
@pytest.mark.parametrize("name", ["conv_out.weight", "mid_block.attentions.0.group_norm.bias"])
@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_folders(tiny_unet: nn.Module, name: str, value: float, kind: str, tmp_path: Path) -> None:
    network: Any = copy.deepcopy(tiny_unet)
    network.get_parameter(name).view(-1)[0] = value
    network.save_pretrained(tmp_path / "unet", safe_serialization=kind == "safetensors")
    DDIMScheduler(clip_sample=False).save_pretrained(tmp_path / "scheduler")
    with pytest.raises(ValueError, match=rf"{tmp_path}/unet: the weights of unet: {name} is not finite: 1 "):
        load_denoiser("tiny", tmp_path, None, False)

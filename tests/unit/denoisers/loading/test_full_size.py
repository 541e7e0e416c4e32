"""The published models' parameters, by name and shape alone, all have a place in the networks that are built for them."""

import gzip
import json
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.helpers.originals import GOLDENS
from tfmq_exp.denoisers.loading import autoencoder
from tfmq_exp.denoisers.loading.condition_encoders import VIT_L_14, load_text_model
from tfmq_exp.denoisers.originals import compvis_unet

UNETS: dict[str, dict[str, Any]] = {
    "ldm_lsun_beds": {
        "image_size": 64,
        "in_channels": 3,
        "out_channels": 3,
        "model_channels": 224,
        "attention_resolutions": [8, 4, 2],
        "num_res_blocks": 2,
        "channel_mult": [1, 2, 3, 4],
        "num_head_channels": 32,
    },
    "ldm_lsun_churches": {
        "image_size": 32,
        "in_channels": 4,
        "out_channels": 4,
        "model_channels": 192,
        "attention_resolutions": [1, 2, 4, 8],
        "num_res_blocks": 2,
        "channel_mult": [1, 2, 2, 4, 4],
        "num_heads": 8,
        "use_scale_shift_norm": True,
        "resblock_updown": True,
    },
    "ldm_cin256_v2": {
        "image_size": 64,
        "in_channels": 3,
        "out_channels": 3,
        "model_channels": 192,
        "attention_resolutions": [8, 4, 2],
        "num_res_blocks": 2,
        "channel_mult": [1, 2, 3, 5],
        "num_heads": 1,
        "use_spatial_transformer": True,
        "transformer_depth": 1,
        "context_dim": 512,
    },
    "sd_v1": {
        "image_size": 32,
        "in_channels": 4,
        "out_channels": 4,
        "model_channels": 320,
        "attention_resolutions": [4, 2, 1],
        "num_res_blocks": 2,
        "channel_mult": [1, 2, 4, 4],
        "num_heads": 8,
        "use_spatial_transformer": True,
        "transformer_depth": 1,
        "context_dim": 768,
        "use_checkpoint": True,
        "legacy": False,
    },
}
UNETS["ldm_celeba"] = UNETS["ldm_ffhq"] = UNETS["ldm_lsun_beds"]
SHARED = {"resolution": 256, "in_channels": 3, "out_ch": 3, "ch": 128, "num_res_blocks": 2, "attn_resolutions": []}
VQ_F4 = {
    "target": "ldm.models.autoencoder.VQModelInterface",
    "params": {
        "embed_dim": 3,
        "n_embed": 8192,
        "ddconfig": {**SHARED, "double_z": False, "z_channels": 3, "ch_mult": [1, 2, 4]},
    },
}
KL_F8 = {
    "target": "ldm.models.autoencoder.AutoencoderKL",
    "params": {"embed_dim": 4, "ddconfig": {**SHARED, "double_z": True, "z_channels": 4, "ch_mult": [1, 2, 4, 4]}},
}
CIFAR = {
    "model": {
        "in_channels": 3,
        "out_ch": 3,
        "ch": 128,
        "ch_mult": [1, 2, 2, 2],
        "num_res_blocks": 2,
        "attn_resolutions": [16],
    },
    "data": {"image_size": 32},
}


def manifest(name: str, prefix: str) -> tuple[dict[str, Tensor], dict[str, int]]:
    """Parameters below a prefix without numbers in them, and the counts of the original program."""
    entry = json.loads(gzip.decompress((GOLDENS / "fullsize_key_manifests.json.gz").read_bytes()))[name]
    state = {
        key.removeprefix(prefix): torch.empty(shape, device="meta")
        for key, shape in entry.pop("tensors").items()
        if key.startswith(prefix)
    }
    return state, entry


def count(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


@pytest.mark.parametrize("name", UNETS)
def test_latent_diffusion(name: str) -> None:
    state, counts = manifest(name, "model.diffusion_model.")
    assert count(compvis_unet.load_unet({"kwargs": UNETS[name]}, state)) == counts["unet_params"]
    state, counts = manifest(name, "first_stage_model.")
    config = KL_F8 if name in ("ldm_lsun_churches", "sd_v1") else VQ_F4
    assert count(autoencoder.load_autoencoder(config, state, 1.0)) == counts["first_stage_params"]


def test_ddim() -> None:
    state, counts = manifest("ddim_cifar10", "")
    assert count(compvis_unet.load_unet({"config": CIFAR}, state)) == counts["unet_params"]


def test_the_text_model_of_stable_diffusion() -> None:
    state, _ = manifest("sd_v1", "cond_stage_model.transformer.")
    assert count(load_text_model(VIT_L_14, state)) == 123_060_480

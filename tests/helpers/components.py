"""Tiny autoencoders and text encoders with random weights, and calls of the latter."""

from typing import Any

import diffusers
import torch
from torch import nn

from tests.helpers.pipelines import GOLDENS
from tests.helpers.tiny_pipelines import randomised
from tfmq_exp.denoisers.pipelines.pipeline_folder import PipelineFolder

LEVELS = {"block_out_channels": (8, 8), "norm_num_groups": 4, "layers_per_block": 1}
UP_DOWN = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
TINY_SIDES = {f"{side}_block_out_channels": (8, 8) for side in ("encoder", "decoder")}
DC_BLOCKS = {f"{side}_block_types": ("ResBlock", "EfficientViTBlock") for side in ("encoder", "decoder")}
DC_SIDES = {f"{side}_block_out_channels": (8, 16) for side in ("encoder", "decoder")}
DC_LAYERS = {f"{side}_layers_per_block": (1, 1) for side in ("encoder", "decoder")}
DC = {
    **DC_BLOCKS,
    **DC_SIDES,
    **DC_LAYERS,
    "encoder_qkv_multiscales": ((), (5,)),
    "decoder_qkv_multiscales": ((), (5,)),
}
KINDS: dict[str, dict[str, Any]] = {
    "AutoencoderKL": {**LEVELS, **UP_DOWN, "latent_channels": 4},
    "VQModel": {**LEVELS, **UP_DOWN, "latent_channels": 3, "num_vq_embeddings": 16},
    "AutoencoderTiny": {**TINY_SIDES, "num_encoder_blocks": (1, 1), "num_decoder_blocks": (2, 1)},
    "AutoencoderDC": {**DC, "latent_channels": 8, "attention_head_dim": 8},
}
# one of each class of text encoders that the goldens hold: pipeline, component
ENCODERS = (
    *(("flux", "text_encoder"), ("flux", "text_encoder_2"), ("sd3", "text_encoder")),
    *(("lumina2", "text_encoder"), ("wan", "text_encoder")),
)


def autoencoder(name: str, **changes: Any) -> Any:
    return randomised(getattr(diffusers, name)(**KINDS[name] | changes))


def latents(name: str, count: int, seed: int = 1) -> torch.Tensor:
    channels = KINDS[name].get("latent_channels", 4)
    return torch.randn(count, channels, 8, 8, generator=torch.Generator().manual_seed(seed))


def encoder(pipeline: str, component: str) -> nn.Module:
    """A new text encoder of a saved pipeline, whose random weights are large enough that blocks change their inputs."""
    return randomised(PipelineFolder(GOLDENS / pipeline).text_components()[component], std=0.1)


def text_calls(model: Any, count: int, seed: int = 0) -> list[Any]:
    """Calls of an encoder, two texts of nine random words each."""
    generator = torch.Generator().manual_seed(seed)
    words = model.config.get_text_config().vocab_size
    return [((torch.randint(3, words, (2, 9), generator=generator),), {}) for _ in range(count)]

"""Published networks at their true sizes: configurations, and one sample of their inputs on the meta device."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from operator import methodcaller
from typing import Any

import torch

zeros = partial(torch.zeros, device="meta")


@dataclass(frozen=True)
class Published:
    """A published network: its class and configuration, arguments of a pass with one sample, and the block to measure."""

    network: str
    config: Mapping[str, Any]
    inputs: Mapping[str, Any]
    block: str
    alike: Callable[[str], bool]  # names of the blocks that it stands for


def blocks_in(prefix: str) -> Callable[[str], bool]:
    return methodcaller("startswith", prefix)


FLUX = {
    "hidden_states": zeros(1, 4096, 64),
    "encoder_hidden_states": zeros(1, 512, 4096),
    **{"pooled_projections": zeros(1, 768), "timestep": zeros(1), "guidance": zeros(1)},
    **{"img_ids": zeros(4096, 3), "txt_ids": zeros(512, 3)},
}
SDXL = {
    "sample": zeros(1, 4, 128, 128),
    **{"timestep": zeros(1), "encoder_hidden_states": zeros(1, 77, 2048)},
    "added_cond_kwargs": {"text_embeds": zeros(1, 1280), "time_ids": zeros(1, 6)},
}
SDXL_CONFIG = {
    **{"sample_size": 128, "block_out_channels": (320, 640, 1280), "cross_attention_dim": 2048},
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    **{"attention_head_dim": (5, 10, 20), "transformer_layers_per_block": (1, 2, 10), "use_linear_projection": True},
    **{
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
}
SD35 = {
    **{"sample_size": 128, "in_channels": 16, "out_channels": 16, "num_layers": 38, "num_attention_heads": 38},
    **{"caption_projection_dim": 2432, "pooled_projection_dim": 2048, "joint_attention_dim": 4096},
    **{"pos_embed_max_size": 192, "qk_norm": "rms_norm"},
}
PIXART = {"sample_size": 128, "interpolation_scale": 2, "caption_channels": 4096, "use_additional_conditions": False}
PUBLISHED = {
    "flux_double": Published(
        "FluxTransformer2DModel",
        {"guidance_embeds": True},
        FLUX,
        "transformer_blocks.1",
        blocks_in("transformer_blocks."),
    ),
    "flux_single": Published(
        "FluxTransformer2DModel",
        {"guidance_embeds": True},
        FLUX,
        "single_transformer_blocks.0",
        blocks_in("single_transformer_blocks."),
    ),
    "sd3.5_large": Published(
        "SD3Transformer2DModel",
        SD35,
        {
            **{"hidden_states": zeros(1, 16, 128, 128), "encoder_hidden_states": zeros(1, 333, 4096)},
            **{"pooled_projections": zeros(1, 2048), "timestep": zeros(1)},
        },
        "transformer_blocks.1",
        blocks_in("transformer_blocks."),
    ),
    "sdxl_transformer": Published(
        "UNet2DConditionModel",
        SDXL_CONFIG,
        SDXL,
        "mid_block.attentions.0.transformer_blocks.0",
        lambda name: "transformer_blocks." in name,
    ),
    "sdxl_resnet": Published(
        "UNet2DConditionModel", SDXL_CONFIG, SDXL, "up_blocks.0.resnets.0", lambda name: "resnets." in name
    ),
    "pixart_sigma": Published(
        "PixArtTransformer2DModel",
        PIXART,
        {
            **{"hidden_states": zeros(1, 4, 128, 128), "encoder_hidden_states": zeros(1, 300, 4096)},
            **{"timestep": zeros(1), "added_cond_kwargs": {"resolution": None, "aspect_ratio": None}},
        },
        "transformer_blocks.1",
        blocks_in("transformer_blocks."),
    ),
    "qwen_image": Published(
        "QwenImageTransformer2DModel",
        {},
        {
            **{"hidden_states": zeros(1, 4096, 64), "encoder_hidden_states": zeros(1, 512, 3584)},
            **{"encoder_hidden_states_mask": torch.ones(1, 512, device="meta", dtype=torch.bool)},
            **{"timestep": zeros(1), "img_shapes": [[(1, 64, 64)]]},
        },
        "transformer_blocks.1",
        blocks_in("transformer_blocks."),
    ),
}

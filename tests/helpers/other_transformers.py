"""Tiny networks of families that the goldens do not hold, with random weights and arguments."""

from typing import Any

import diffusers
import torch
from torch import Tensor, nn

from tests.conftest import generic

HEADS = {"num_attention_heads": 2, "attention_head_dim": 16}
NARROW = {"num_attention_heads": 2, "attention_head_dim": 8, "in_channels": 4}
ROPE = {**HEADS, "in_channels": 16, "joint_attention_dim": 12, "num_layers": 1}
TEXT = {"encoder_hidden_states": (2, 5, 12)}
MASK = {"encoder_attention_mask": torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])}
ROWS = {"hidden_states": (2, 16, 16), **TEXT}
IMAGE = {"hidden_states": (2, 4, 8, 8), **TEXT}
IDS = {"img_ids": torch.arange(48.0).view(16, 3), "txt_ids": torch.zeros(5, 3)}
IDS_2 = {"img_ids": torch.arange(64.0).view(16, 4), "txt_ids": torch.zeros(5, 4)}
REAL, WHOLE = torch.tensor([0.7, 0.1]), torch.tensor([700, 20])

# class, its configuration, and its arguments: values, or shapes of random ones
OTHERS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "cogvideox": (
        "CogVideoXTransformer3DModel",
        {
            **{**HEADS, "in_channels": 4, "out_channels": 4, "num_layers": 2, "text_embed_dim": 12, "sample_frames": 5},
            **{"time_embed_dim": 6, "sample_width": 8, "sample_height": 8, "max_text_seq_length": 5},
        },
        {**TEXT, "hidden_states": (2, 2, 4, 8, 8), "timestep": WHOLE},
    ),
    "auraflow": (
        "AuraFlowTransformer2DModel",
        {
            **{**NARROW, "joint_attention_dim": 12, "caption_projection_dim": 16, "sample_size": 8},
            **{"num_mmdit_layers": 1, "num_single_dit_layers": 1, "pos_embed_max_size": 16},
        },
        {**IMAGE, "timestep": REAL},
    ),
    "sdxl": (
        "UNet2DConditionModel",
        {
            **{"sample_size": 8, "block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 4},
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
            **{"cross_attention_dim": 12, "transformer_layers_per_block": (1, 2), "use_linear_projection": True},
            **{"addition_embed_type": "text_time", "addition_time_embed_dim": 4, "attention_head_dim": (1, 2)},
            "projection_class_embeddings_input_dim": 34,
        },
        {
            **{**TEXT, "sample": (2, 4, 8, 8), "timestep": WHOLE, "added_cond_kwargs.text_embeds": (2, 10)},
            "added_cond_kwargs.time_ids": torch.tensor([[64.0, 64, 0, 0, 64, 64], [32, 64, 4, 0, 64, 32]]),
        },
    ),
    "unet": (
        "UNet2DModel",
        {
            **{"sample_size": 8, "block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 4},
            **{
                "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
                "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
            },
        },
        {"sample": (2, 3, 8, 8), "timestep": WHOLE},
    ),
    "unet_of_texts": (  # the first attention of a block reads the text, too
        "UNet2DConditionModel",
        {
            **{"sample_size": 8, "block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 4},
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
            **{"cross_attention_dim": 12, "only_cross_attention": True, "attention_head_dim": 2},
        },
        {**TEXT, "sample": (2, 4, 8, 8), "timestep": WHOLE},
    ),
    "flux2": (
        "Flux2Transformer2DModel",
        {**ROPE, "num_single_layers": 1, "axes_dims_rope": (4, 4, 4, 4), "timestep_guidance_channels": 8},
        {**ROWS, **IDS_2, "timestep": REAL, "guidance": torch.tensor([1.0, 3.5])},
    ),
    "chroma": (
        "ChromaTransformer2DModel",
        {
            **{**ROPE, "num_single_layers": 1, "axes_dims_rope": (4, 6, 6), "approximator_num_channels": 16},
            **{"approximator_hidden_dim": 20, "approximator_layers": 1},
        },
        {**ROWS, **IDS, "timestep": REAL},
    ),
    "qwen_image": (
        "QwenImageTransformer2DModel",
        {**ROPE, "out_channels": 4, "axes_dims_rope": (4, 6, 6)},
        {
            **ROWS,
            "timestep": REAL,
            "img_shapes": [[(1, 4, 4)]] * 2,
            "encoder_hidden_states_mask": torch.ones(2, 5).long(),
        },
    ),
    "hunyuan_video": (
        "HunyuanVideoTransformer3DModel",
        {
            **{**NARROW, "out_channels": 4, "attention_head_dim": 10, "num_layers": 1, "num_single_layers": 1},
            **{"num_refiner_layers": 1, "text_embed_dim": 12, "pooled_projection_dim": 9, "rope_axes_dim": (2, 4, 4)},
        },
        {
            **{**TEXT, **MASK, "hidden_states": (2, 4, 2, 8, 8), "timestep": WHOLE.float()},
            **{"pooled_projections": (2, 9), "guidance": torch.tensor([1000.0, 6000.0])},
        },
    ),
    "hunyuan_dit": (
        "HunyuanDiT2DModel",
        {
            **{**NARROW, "patch_size": 2, "sample_size": 8, "hidden_size": 16, "num_layers": 4, "text_len": 5},
            **{"cross_attention_dim": 12, "cross_attention_dim_t5": 16, "pooled_projection_dim": 9, "text_len_t5": 3},
            "activation_fn": "gelu-approximate",
        },
        {
            **{**IMAGE, "timestep": WHOLE.float(), "text_embedding_mask": torch.ones(2, 5).long()},
            **{"encoder_hidden_states_t5": (2, 3, 16), "text_embedding_mask_t5": torch.ones(2, 3).long()},
            **{"image_meta_size": torch.tensor([[64, 64, 64, 64, 0, 0]] * 2), "style": torch.tensor([0, 0])},
            **{"image_rotary_emb.0": (16, 8), "image_rotary_emb.1": (16, 8)},
        },
    ),
    "sana": (
        "SanaTransformer2DModel",
        {
            **{**NARROW, "out_channels": 4, "num_layers": 1, "caption_channels": 12, "sample_size": 8, "patch_size": 1},
            **{"num_cross_attention_heads": 2, "cross_attention_head_dim": 8, "cross_attention_dim": 16},
        },
        {**IMAGE, **MASK, "timestep": WHOLE.float()},
    ),
    "ltx": (
        "LTXVideoTransformer3DModel",
        {
            **{**NARROW, "in_channels": 8, "out_channels": 8, "num_layers": 1, "caption_channels": 12},
            **{"cross_attention_dim": 16},
        },
        {
            **TEXT,
            **MASK,
            "hidden_states": (2, 32, 8),
            "timestep": WHOLE.float(),
            "num_frames": 2,
            "height": 4,
            "width": 4,
        },
    ),
}


def build(name: str) -> tuple[nn.Module, dict[str, Any]]:
    """One of `OTHERS` and its flat arguments for two samples."""
    network, config, arguments = OTHERS[name]
    generator = torch.Generator().manual_seed(3)
    given = {
        key: torch.randn(value, generator=generator) if isinstance(value, tuple) else value
        for key, value in arguments.items()
    }
    return generic(lambda: getattr(diffusers, network)(**config)), given


def result(network: nn.Module, arguments: dict[str, Any]) -> Tensor:
    """What a network returns for arguments that are no longer flat."""
    with torch.no_grad():
        return network(**arguments, return_dict=False)[0]

"""Original CompVis and DDIM UNets as diffusers networks: architecture and key map.

Covers LDM's `openaimodel.UNetModel` (unconditional and with spatial transformers) and the UNet of DDIM. Outputs agree
with the originals to float32 rounding.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers import UNet2DConditionModel, UNet2DModel
from torch import Tensor, nn

from tfmq_exp.denoisers.loading.state_dict import assign_weights
from tfmq_exp.denoisers.unet import attentions, set_heads

INNER = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
    "norm": "group_norm",
    "proj_out": "to_out.0",
    "op": "conv",
}
TOP = {
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "input_blocks.0.0": "conv_in",
    "out.0": "conv_norm_out",
    "out.2": "conv_out",
}
DDIM_PARTS = {
    "temb.dense.0": "time_embedding.linear_1",
    "temb.dense.1": "time_embedding.linear_2",
    "norm_out": "conv_norm_out",
    "mid.block_1": "mid_block.resnets.0",
    "mid.block_2": "mid_block.resnets.1",
    "mid.attn_1": "mid_block.attentions.0",
}
DDIM_ATTENTION = {
    ".norm.": ".group_norm.",
    ".q.": ".to_q.",
    ".k.": ".to_k.",
    ".v.": ".to_v.",
    ".proj_out.": ".to_out.0.",
}

# q, k, v in another order; conditions that are added to the time embedding; linear layers for projections
UNSUPPORTED = ("use_new_attention_order", "num_classes", "use_linear_in_transformer", "n_embed")


def openai_unet(kwargs: Mapping[str, Any]) -> nn.Module:
    """The diffusers network of an LDM `UNetModel` with these constructor arguments.

    Raises:
        ValueError: an option that would need another network.
    """
    if other := [option for option in UNSUPPORTED if kwargs.get(option)]:
        raise ValueError(f"UNetModel's option {other[0]}={kwargs[other[0]]!r} is not supported")
    multipliers: Sequence[int] = kwargs["channel_mult"]
    channels = [kwargs["model_channels"] * m for m in multipliers]
    attends = [2**level in kwargs["attention_resolutions"] for level in range(len(channels))]
    conditional = bool(kwargs.get("use_spatial_transformer"))
    updown = bool(kwargs.get("resblock_updown"))
    width = kwargs.get("num_head_channels", -1)
    heads = kwargs.get("num_heads", -1)
    # the last level has no downsampler and the first no upsampler
    resample = ["Resnet{}sampleBlock2D" if updown else "{}Block2D"] * (len(channels) - 1)
    blocks_down, blocks_up = [*resample, "{}Block2D"], ["{}Block2D", *resample]
    attention = ("CrossAttn" if conditional else "Attn") + "{}Block2D"
    down = [(attention if attend else block).format("Down") for attend, block in zip(attends, blocks_down, strict=True)]
    up = [(attention if attend else block).format("Up") for attend, block in zip(attends, blocks_up, strict=True)]
    shared: dict[str, Any] = {
        "sample_size": kwargs["image_size"],
        "in_channels": kwargs["in_channels"],
        "out_channels": kwargs["out_channels"],
        "block_out_channels": tuple(channels),
        "layers_per_block": kwargs["num_res_blocks"],
        "down_block_types": tuple(down),
        "up_block_types": tuple(reversed(up)),
        "norm_eps": 1e-5,
        "norm_num_groups": 32,
        "flip_sin_to_cos": True,
        "freq_shift": 0,
        "downsample_padding": 1,
    }
    scale_shift = "scale_shift" if kwargs.get("use_scale_shift_norm") else "default"
    if conditional:
        count: Any = heads if width == -1 else [c // width for c in channels]
        return UNet2DConditionModel(
            **shared,
            cross_attention_dim=kwargs["context_dim"],
            transformer_layers_per_block=kwargs.get("transformer_depth", 1),
            attention_head_dim=count,  # diffusers calls the number of heads by this name
            use_linear_projection=False,
            resnet_time_scale_shift=scale_shift,
        )
    unet = UNet2DModel(
        **shared,
        attention_head_dim=None if width == -1 else width,
        attn_norm_num_groups=32,
        resnet_time_scale_shift=scale_shift,
        downsample_type="resnet" if updown else "conv",
        upsample_type="resnet" if updown else "conv",
    )
    if width == -1:
        for module in attentions(unet).values():
            set_heads(module, heads)
    return unet


def ddim_unet(config: Mapping[str, Any]) -> nn.Module:
    """The diffusers network of a DDIM model with this configuration (sections `model` and `data`)."""
    model, size = config["model"], config["data"]["image_size"]
    attends = [size // 2**level in model["attn_resolutions"] for level in range(len(model["ch_mult"]))]
    return UNet2DModel(
        sample_size=size,
        in_channels=model["in_channels"],
        out_channels=model["out_ch"],
        block_out_channels=tuple(model["ch"] * m for m in model["ch_mult"]),
        layers_per_block=model["num_res_blocks"],
        down_block_types=tuple("AttnDownBlock2D" if a else "DownBlock2D" for a in attends),
        up_block_types=tuple("AttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attends)),
        attention_head_dim=None,
        norm_eps=1e-6,
        flip_sin_to_cos=False,
        freq_shift=1,
        downsample_padding=0,
        dropout=model.get("dropout", 0.0),
    )


def openai_key(key: str, layers_per_block: int, keys: frozenset[str]) -> str:
    """The diffusers name of one parameter of an LDM UNet; the key itself if it is none."""
    module, _, parameter = key.rpartition(".")
    if module in TOP:
        return f"{TOP[module]}.{parameter}"
    place = re.match(r"(input_blocks|middle_block|output_blocks)\.(?:(\d+)\.)?(\d+)\.(.+)", module)
    if place is None:
        return key
    part, index, child, inner = place.groups()
    outer = module.removesuffix(inner)
    siblings = {k.removeprefix(outer).split(".")[0] for k in keys if k.startswith(outer)}
    transformer = "transformer_blocks" in siblings
    kind = "attentions" if transformer or "qkv" in siblings else "resnets"
    if part == "middle_block":
        block = f"mid_block.{kind}.{int(child) // 2}"
    else:
        side = "down" if part == "input_blocks" else "up"
        level, layer = divmod(int(index) - (side == "down"), layers_per_block + 1)
        resamples = layer == layers_per_block if side == "down" else child != "0" and kind == "resnets"
        block = f"{side}_blocks.{level}." + (f"{side}samplers.0" if resamples else f"{kind}.{layer}")
    return f"{block}.{inner if transformer else INNER.get(inner, inner)}.{parameter}"


def ddim_key(key: str, levels: int) -> str:
    """The diffusers name of one parameter of a DDIM UNet."""
    for original, ours in DDIM_PARTS.items():
        if key.startswith(original + "."):
            key = ours + key[len(original) :]
    key = re.sub(r"^up\.(\d+)", lambda m: f"up_blocks.{levels - 1 - int(m[1])}", key)
    key = re.sub(r"^down\.(\d+)", r"down_blocks.\1", key)
    key = key.replace(".block.", ".resnets.").replace(".attn.", ".attentions.")
    key = key.replace(".downsample.", ".downsamplers.0.").replace(".upsample.", ".upsamplers.0.")
    if "attentions" in key:
        for original, ours in DDIM_ATTENTION.items():
            key = key.replace(original, ours)
    return key.replace("temb_proj", "time_emb_proj").replace("nin_shortcut", "conv_shortcut")


def split_qkv(fused: Tensor, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v of LDM's fused projection, whose rows are grouped by head as [q, k, v]."""
    rows = fused.flatten(1) if fused.dim() > 1 else fused
    grouped = rows.reshape(heads, 3, -1, *rows.shape[1:])
    q, k, v = (grouped[:, i].flatten(0, 1) for i in range(3))
    return q, k, v


def convert(state: Mapping[str, Tensor], unet: Any, *, ddim: bool) -> dict[str, Tensor]:
    """A state dict for `unet` from one with original key names (bare UNet keys); what it has no place for keeps its name."""
    keys = frozenset(state)
    layers = unet.config["layers_per_block"]
    heads = {name: module.heads for name, module in attentions(unet).items()}
    matrices = {name for name, value in unet.state_dict().items() if value.dim() == 2}
    converted: dict[str, Tensor] = {}
    for key, value in state.items():
        name = ddim_key(key, len(unet.config["block_out_channels"])) if ddim else openai_key(key, layers, keys)
        module, fused, parameter = name.partition(".qkv.")
        if fused and module in heads and len(value) % (3 * heads[module]) == 0:
            parts = zip(("to_q", "to_k", "to_v"), split_qkv(value, heads[module]), strict=True)
            converted |= {f"{module}.{part}.{parameter}": rows for part, rows in parts}
        else:  # a matrix may have been a convolution of size 1
            converted[name] = value.flatten(1) if name in matrices and value.dim() > 1 else value
    return converted


def build(architecture: Mapping[str, Any]) -> nn.Module:
    """The diffusers UNet of an original architecture record; see `load`."""
    try:
        return ddim_unet(architecture["config"]) if "config" in architecture else openai_unet(architecture["kwargs"])
    except KeyError as error:
        raise ValueError(f"the architecture of the UNet lacks {error}") from error


def load(architecture: Mapping[str, Any], state: Mapping[str, Tensor]) -> nn.Module:
    """A diffusers UNet from an original architecture record and its weights, loaded strictly.

    Args:
        architecture: `kwargs` of an LDM UNetModel, or the `config` of a DDIM model.
        state: parameters of the UNet alone, by their original names. The network takes them over, without a copy.

    Raises:
        ValueError: an architecture that is not known here, or weights that do not fit it.
    """
    with torch.device("meta"):
        unet = build(architecture)
    assign_weights(unet, convert(state, unet, ddim="config" in architecture))
    return unet

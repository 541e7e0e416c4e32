"""Original UNets as diffusers networks, architecture and key map: LDM's `openaimodel.UNetModel` and that of DDIM.

Outputs agree with the originals to float32 rounding.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from diffusers import UNet2DConditionModel, UNet2DModel
from torch import Tensor, nn

from tfmq_exp.denoisers.families.unet import attentions, set_heads
from tfmq_exp.denoisers.loading.checkpoint import assign_weights

# diffusers' names of settings -> LDM's, and DDIM's.
SETTINGS = {
    **{"sample_size": "image_size", "in_channels": "in_channels"},
    **{"out_channels": "out_channels", "layers_per_block": "num_res_blocks"},
}
DDIM_SETTINGS = {"in_channels": "in_channels", "out_channels": "out_ch", "layers_per_block": "num_res_blocks"}
# LDM's names of layers within a block -> diffusers'.
INNER = {
    **{"in_layers.0": "norm1", "in_layers.2": "conv1", "emb_layers.1": "time_emb_proj"},
    **{"out_layers.0": "norm2", "out_layers.3": "conv2", "skip_connection": "conv_shortcut"},
    **{"norm": "group_norm", "proj_out": "to_out.0", "op": "conv"},
}
TOP = {
    **{"time_embed.0": "time_embedding.linear_1", "time_embed.2": "time_embedding.linear_2"},
    **{"input_blocks.0.0": "conv_in", "out.0": "conv_norm_out", "out.2": "conv_out"},
}
# Parts of DDIM's names -> diffusers', one after the other.
DDIM_PARTS = {
    r"^temb\.dense\.0\.": "time_embedding.linear_1.",
    r"^temb\.dense\.1\.": "time_embedding.linear_2.",
    r"^norm_out\.": "conv_norm_out.",
    r"^mid\.block_1\.": "mid_block.resnets.0.",
    r"^mid\.block_2\.": "mid_block.resnets.1.",
    r"^mid\.attn_1\.": "mid_block.attentions.0.",
    r"^(down|up)\.": r"\1_blocks.",
    r"\.block\.": ".resnets.",
    r"\.attn\.": ".attentions.",
    r"\.(down|up)sample\.": r".\1samplers.0.",
    r"(attentions\..*)\.norm\.": r"\1.group_norm.",
    r"(attentions\..*)\.([qkv])\.": r"\1.to_\2.",
    r"(attentions\..*)\.proj_out\.": r"\1.to_out.0.",
    r"temb_proj": "time_emb_proj",
    r"nin_shortcut": "conv_shortcut",
}
RESAMPLING = {"DownBlock2D": "ResnetDownsampleBlock2D", "UpBlock2D": "ResnetUpsampleBlock2D"}
# q, k, v in another order; conditions that are added to the time embedding; linear layers for projections
UNSUPPORTED = ("use_new_attention_order", "num_classes", "use_linear_in_transformer", "n_embed")


def block_types(
    attends: Sequence[bool], attention: str = "Attn", sides: tuple[str, str] = ("Down", "Up")
) -> dict[str, tuple[str, ...]]:
    """Diffusers' types of blocks, from whether the levels have attention, from the largest on."""
    down, up = ([f"{attention * attend}{side}Block2D" for attend in attends] for side in sides)
    return {"down_block_types": tuple(down), "up_block_types": tuple(reversed(up))}


def openai_unet(kwargs: Mapping[str, Any]) -> nn.Module:
    """The diffusers network of an LDM `UNetModel` with these constructor arguments; ValueError for unsupported ones."""
    if other := [option for option in UNSUPPORTED if kwargs.get(option)]:
        raise ValueError(f"UNetModel's option {other[0]}={kwargs[other[0]]!r} is not supported")
    channels = [kwargs["model_channels"] * m for m in kwargs["channel_mult"]]
    attends = [2**level in kwargs["attention_resolutions"] for level in range(len(channels))]
    conditional, updown = bool(kwargs.get("use_spatial_transformer")), bool(kwargs.get("resblock_updown"))
    width, heads = kwargs.get("num_head_channels", -1), kwargs.get("num_heads", -1)
    types = block_types(attends, "CrossAttn" if conditional else "Attn")
    if updown:  # the last block of either side does not resample
        for side, (*names, last) in types.items():
            types[side] = (*(RESAMPLING.get(name, name) for name in names), last)
    shared: dict[str, Any] = {
        **{ours: kwargs[theirs] for ours, theirs in SETTINGS.items()},
        "block_out_channels": tuple(channels),
        "resnet_time_scale_shift": "scale_shift" if kwargs.get("use_scale_shift_norm") else "default",
        **{"norm_eps": 1e-5, "norm_num_groups": 32, "flip_sin_to_cos": True, "freq_shift": 0, "downsample_padding": 1},
        **types,
    }
    if conditional:
        count: Any = heads if width == -1 else [c // width for c in channels]
        return UNet2DConditionModel(
            **shared,
            cross_attention_dim=kwargs["context_dim"],
            transformer_layers_per_block=kwargs.get("transformer_depth", 1),
            attention_head_dim=count,  # diffusers calls the number of heads by this name
            use_linear_projection=False,
        )
    resample: dict[str, Any] = dict.fromkeys(("downsample_type", "upsample_type"), "resnet" if updown else "conv")
    head_width = None if width == -1 else width
    network = UNet2DModel(**shared, **resample, attention_head_dim=head_width, attn_norm_num_groups=32)
    for module in attentions(network).values() if width == -1 else ():
        set_heads(module, heads)
    return network


def ddim_unet(config: Mapping[str, Any]) -> nn.Module:
    """The diffusers network of a DDIM model with this configuration (sections `model` and `data`)."""
    model, size = config["model"], config["data"]["image_size"]
    attends = [size // 2**level in model["attn_resolutions"] for level in range(len(model["ch_mult"]))]
    settings: dict[str, Any] = {
        "sample_size": size,
        **{ours: model[theirs] for ours, theirs in DDIM_SETTINGS.items()},
        "block_out_channels": tuple(model["ch"] * m for m in model["ch_mult"]),
        **{"norm_eps": 1e-6, "flip_sin_to_cos": False, "freq_shift": 1, "downsample_padding": 0},
        **block_types(attends),
    }
    return UNet2DModel(**settings, attention_head_dim=None, dropout=model.get("dropout", 0.0))


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
    for part, name in DDIM_PARTS.items():
        key = re.sub(part, name, key)
    return re.sub(r"^up_blocks\.(\d+)", lambda m: f"up_blocks.{levels - 1 - int(m[1])}", key)


def renamed(state: Mapping[str, Tensor], network: nn.Module, name_of: Callable[[str], str]) -> dict[str, Tensor]:
    """A state dict by the names of `network`, whose matrices may have been convolutions of size 1."""
    matrices = {name for name, value in network.state_dict().items() if value.dim() == 2}
    named = ((name_of(key), value) for key, value in state.items())
    return {name: value.flatten(1) if name in matrices and value.dim() > 1 else value for name, value in named}


def convert_unet(state: Mapping[str, Tensor], network: Any, *, ddim: bool) -> dict[str, Tensor]:
    """A state dict for `unet` from one with original key names (bare UNet keys); what it has no place for keeps its name."""
    if ddim:
        levels = len(network.config["block_out_channels"])
        return renamed(state, network, lambda key: ddim_key(key, levels))
    layers, keys = network.config["layers_per_block"], frozenset(state)
    converted = renamed(state, network, lambda key: openai_key(key, layers, keys))
    for name, attention in attentions(network).items():
        for parameter in ("weight", "bias"):
            fused = converted.get(f"{name}.qkv.{parameter}")
            if fused is not None and len(fused) % (3 * attention.heads) == 0:
                del converted[f"{name}.qkv.{parameter}"]
                # LDM's rows are grouped by head as [q, k, v]
                rows = (fused.flatten(1) if fused.dim() > 1 else fused).unflatten(0, (attention.heads, 3, -1))
                converted |= {f"{name}.to_{q}.{parameter}": rows[:, i].flatten(0, 1) for i, q in enumerate("qkv")}
    return converted


def build_unet(architecture: Mapping[str, Any]) -> nn.Module:
    """The UNet of an architecture as `load_unet` takes it, with random weights."""
    try:
        return ddim_unet(architecture["config"]) if "config" in architecture else openai_unet(architecture["kwargs"])
    except KeyError as error:
        raise ValueError(f"the architecture of the UNet lacks {error}") from error


def load_unet(architecture: Mapping[str, Any], state: Mapping[str, Tensor]) -> nn.Module:
    """Build a diffusers UNet of an original architecture and load its weights, strictly; it takes them over.

    The architecture has the `kwargs` of an LDM UNetModel, or the `config` of a DDIM model; `state` the UNet's original names.

    Raises:
        ValueError: an architecture that is not known here, or weights that do not fit it.
    """
    with torch.device("meta"):
        network = build_unet(architecture)
    assign_weights(network, convert_unet(state, network, ddim="config" in architecture))
    return network

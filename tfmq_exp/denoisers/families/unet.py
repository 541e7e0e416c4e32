"""Diffusers' UNets, which take a class, a pooled text with sizes, or an image beside the timestep, or nothing."""

from collections.abc import Iterator, Sequence
from typing import Any

from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import Attention
from diffusers.models.downsampling import Downsample2D
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from diffusers.models.upsampling import Upsample2D
from torch import Tensor, nn

from tfmq_exp.denoisers.families.family import Conditions, Family, known_roles
from tfmq_exp.denoisers.families.inputs import inputs_by_pattern
from tfmq_exp.denoisers.structure import Kind, Role

ADDED = "added_cond_kwargs."
CONDITIONS = ("class_labels", *(f"{ADDED}{name}" for name in ("text_embeds", "time_ids", "image_embeds")))

# Roles of the layers inside a module of a known class, by the layer's path within it.
ROLES_WITHIN: dict[type[nn.Module], dict[str, Role]] = {
    ResnetBlock2D: {
        **{"conv1": Role.RES_CONV, "conv2": Role.RES_CONV},
        **{"conv_shortcut": Role.SHORTCUT, "time_emb_proj": Role.TIME_PROJ},
    },
    Attention: {**dict.fromkeys(("to_q", "to_k", "to_v"), Role.ATTN_QKV), "to_out.0": Role.ATTN_OUT},
    BasicTransformerBlock: {"ff.net.0.proj": Role.FEED_FORWARD, "ff.net.2": Role.FEED_FORWARD},
    Transformer2DModel: {"proj_in": Role.PROJECTION, "proj_out": Role.PROJECTION},
    Downsample2D: {"conv": Role.DOWNSAMPLE},
    Upsample2D: {"conv": Role.UPSAMPLE},
}
ROLES_AT_TOP = {
    **{"conv_in": Role.STEM, "conv_out": Role.HEAD},
    **dict.fromkeys(("time_embedding.linear_1", "time_embedding.linear_2"), Role.TIME_EMBED),
    **{f"{module}.linear_{i}": Role.CONDITION_EMBED for module in ("add_embedding", "class_embedding") for i in (1, 2)},
    "class_embedding": Role.CONDITION_EMBED,
}


def roles(network: nn.Module) -> dict[str, Role]:
    """The role of every layer with weights; ValueError for one that has none here, of a kind of network not known here."""
    found = dict(ROLES_AT_TOP)
    for name, module in network.named_modules():
        for path, role in ROLES_WITHIN.get(type(module), {}).items():
            found[f"{name}.{path}"] = role
    return known_roles(network, found)


def blocks(network: nn.Module) -> Iterator[tuple[str, Kind]]:
    """Modules that are reconstructed as a whole."""
    yield "time_embedding", Kind.TEMPORAL
    outer = "."
    for name, module in network.named_modules():
        if isinstance(module, ResnetBlock2D | BasicTransformerBlock | Attention) and not name.startswith(outer):
            outer = f"{name}."
            yield name, Kind.RESIDUAL if isinstance(module, ResnetBlock2D) else Kind.ATTENTION


def shortcut_splits(network: Any) -> dict[str, int]:
    """Number of the trunk's channels in the input of each decoder shortcut: they come first, those of the skip follow."""
    found: dict[str, int] = {}
    trunk = (network.mid_block or network.down_blocks[-1]).resnets[-1].out_channels
    for i, block in enumerate(network.up_blocks):
        for j, resnet in enumerate(block.resnets):
            if resnet.conv_shortcut is not None and trunk < resnet.in_channels:
                found[f"up_blocks.{i}.resnets.{j}.conv_shortcut"] = trunk
            trunk = resnet.out_channels
    return found


def time_embedding(network: Any, t: Tensor, conditions: Conditions) -> Tensor:
    """Input of every embedding projection, [rows, channels]: the embedding of time and conditions after its activation."""
    # not `unet.dtype`, which walks over every parameter of the network
    dtype = next(network.parameters()).dtype
    embedding = network.time_embedding(network.time_proj(t).to(dtype))
    if "class_labels" in conditions:
        labels = conditions["class_labels"]
        by_time = network.config["class_embed_type"] == "timestep"
        embedding = embedding + network.class_embedding(network.time_proj(labels).to(dtype) if by_time else labels).to(
            dtype
        )
    if added := {name.removeprefix(ADDED): value for name, value in conditions.items() if name.startswith(ADDED)}:
        embedding = embedding + network.get_aug_embed(embedding, None, added)
    if getattr(network, "time_embed_act", None) is not None:  # UNet2DModel has none
        embedding = network.time_embed_act(embedding)
    # all residual blocks of a network have the same
    block = next(m for m in network.modules() if isinstance(m, ResnetBlock2D) and m.time_emb_proj is not None)
    return embedding if block.skip_time_act else block.nonlinearity(embedding)


def features(network: Any, projections: Sequence[str], t: Tensor, conditions: Conditions) -> dict[str, Tensor]:
    """g_i(h) of every residual block i, with h the embedding and g_i its projection (TFMQ-DM, section 4.1)."""
    embedding = time_embedding(network, t, conditions)
    return {name: network.get_submodule(name)(embedding) for name in projections}


def attentions(network: nn.Module) -> dict[str, Attention]:
    """Every attention module of a UNet by name; none of other networks, whose attentions are of many classes."""
    if type(network).__name__ not in (UNET.network, CONDITIONAL_UNET.network):
        return {}
    return {name: module for name, module in network.named_modules() if isinstance(module, Attention)}


def set_heads(attention: Attention, heads: int) -> None:
    """Change the number of heads at the same width, which a diffusers configuration cannot always express."""
    width = attention.inner_dim // heads
    attention.heads, attention.sliceable_head_dim, attention.scale = heads, heads, width**-0.5


INPUTS = inputs_by_pattern(
    {
        "*.group_norm": (("to_[qkv]",),),
        "*.norm": (("proj_in",),),
        "*.norm1": (("attn1.to_[qkv]",),),
        "*.norm2": (("attn2.to_[qkv]",),),
        "*.norm3": (("ff.net.0.proj",),),
    }
)
UNET, CONDITIONAL_UNET = (
    Family(network, roles, blocks, features, CONDITIONS, shortcut_splits, INPUTS, segment=lambda _network: None)
    for network in ("UNet2DModel", "UNet2DConditionModel")
)

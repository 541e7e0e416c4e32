"""Transformers with adaLN-single: one layer serves all blocks, each of which adds a table of its own (arXiv 2310.00426, 2.3)."""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from tfmq_exp.denoisers.families.family import (
    ATTENTION,
    FEED_FORWARD,
    Conditions,
    Family,
    blocks_by_pattern,
    roles_by_pattern,
)
from tfmq_exp.denoisers.families.inputs import inputs_by_pattern
from tfmq_exp.denoisers.structure import Kind, Role

EMBED = {
    "*.timestep_embedder.linear_?": Role.TIME_EMBED,
    **dict.fromkeys(("*.guidance_embedder.linear_?", "*.resolution_embedder.linear_?"), Role.CONDITION_EMBED),
    "*.aspect_ratio_embedder.linear_?": Role.CONDITION_EMBED,
}
CAPTION = {"caption_projection.linear_?": Role.TEXT_PROJ}
# `norm2` is the feed-forward's; cross-attention reads the residual stream
INPUTS = inputs_by_pattern(
    {}, {"*.norm1": (("attn1.to_[qkv]",),), "*.norm2": (("ff.net.0.proj",),), "norm_out": (("proj_out",),)}
)
BLOCKS = {"transformer_blocks.*": Kind.TRANSFORMER, "caption_projection": Kind.LAYER}
# (network, timesteps, conditions) -> embedding of the timestep alone, and with that of the conditions
Embedding = Callable[[Any, Tensor, Conditions], tuple[Tensor, Tensor]]


def both(embedder: str, projection: str, embedding: Embedding) -> Callable[..., dict[str, Tensor]]:
    """The two features: what all blocks add their tables to, and the timestep's embedding, which the last layer reads as it is.

    Both count alike in an error, though the first serves every block.

    Args:
        embedder: name of the last layer of the timestep's embedder.
        projection: name of the layer that serves all blocks.
        embedding: see `Embedding`; [rows, channels] each.
    """

    def features(network: Any, projections: Sequence[str], t: Tensor, given: Conditions) -> dict[str, Tensor]:
        of_time, embedded = embedding(network, t, given)
        return {projection: network.get_submodule(projection)(nn.functional.silu(embedded)), embedder: of_time}

    return features


SIZES = ("resolution", "aspect_ratio")  # of the pictures, PixArt-alpha at 1024 pixels


def pixart_embedding(network: Any, t: Tensor, given: Conditions) -> tuple[Tensor, Tensor]:
    dtype, embed = next(network.parameters()).dtype, network.adaln_single.emb
    of_time = embed.timestep_embedder(embed.time_proj(t).to(dtype))
    if not embed.use_additional_conditions:
        return of_time, of_time
    sizes = {name: given[f"added_cond_kwargs.{name}"] for name in SIZES}
    return of_time, embed(t, **sizes, batch_size=len(t), hidden_dtype=dtype)


PIXART = Family(
    "PixArtTransformer2DModel",
    roles_by_pattern(
        {
            **EMBED,
            **{"pos_embed.proj": Role.STEM, "adaln_single.linear": Role.TIME_PROJ, "proj_out": Role.HEAD},
            **CAPTION,
            **ATTENTION,
            **FEED_FORWARD,
        }
    ),
    blocks_by_pattern({"adaln_single": Kind.TEMPORAL, **BLOCKS}),
    both("adaln_single.emb.timestep_embedder.linear_2", "adaln_single.linear", pixart_embedding),
    tuple(f"added_cond_kwargs.{name}" for name in SIZES),
    inputs=INPUTS,
)


def sana_embedding(network: Any, t: Tensor, given: Conditions) -> tuple[Tensor, Tensor]:
    dtype, guided = next(network.parameters()).dtype, network.config.guidance_embeds
    embed = network.time_embed if guided else network.time_embed.emb
    of_time = embed.timestep_embedder(embed.time_proj(t).to(dtype))
    if not guided:
        return of_time, of_time
    return of_time, of_time + embed.guidance_embedder(embed.guidance_condition_proj(given["guidance"]).to(dtype))


def sana_features(network: Any, projections: Sequence[str], t: Tensor, given: Conditions) -> dict[str, Tensor]:
    embed = "timestep_embedder" if network.config.guidance_embeds else "emb.timestep_embedder"
    return both(f"time_embed.{embed}.linear_2", "time_embed.linear", sana_embedding)(network, projections, t, given)


SANA = Family(
    "SanaTransformer2DModel",
    roles_by_pattern(
        {
            **EMBED,
            **{"patch_embed.proj": Role.STEM, "time_embed.linear": Role.TIME_PROJ, "proj_out": Role.HEAD},
            **CAPTION,
            **ATTENTION,
            "*.ff.conv_*": Role.FEED_FORWARD,
        }
    ),
    blocks_by_pattern({"time_embed": Kind.TEMPORAL, **BLOCKS}),
    sana_features,
    ("guidance",),
    inputs=INPUTS,
)


def ltx_embedding(network: Any, t: Tensor, given: Conditions) -> tuple[Tensor, Tensor]:
    embed = network.time_embed.emb
    of_time = embed.timestep_embedder(embed.time_proj(t).to(next(network.parameters()).dtype))
    return of_time, of_time


LTX = Family(
    "LTXVideoTransformer3DModel",
    roles_by_pattern(
        {
            **EMBED,
            **{"proj_in": Role.STEM, "time_embed.linear": Role.TIME_PROJ, "proj_out": Role.HEAD},
            **CAPTION,
            **ATTENTION,
            **FEED_FORWARD,
        }
    ),
    blocks_by_pattern({"time_embed": Kind.TEMPORAL, **BLOCKS}),
    both("time_embed.emb.timestep_embedder.linear_2", "time_embed.linear", ltx_embedding),
    inputs=INPUTS,
)


def wan_embedding(network: Any, t: Tensor, given: Conditions) -> tuple[Tensor, Tensor]:
    embed = network.condition_embedder
    of_time = embed.time_embedder(embed.timesteps_proj(t).to(next(network.parameters()).dtype))
    return of_time, of_time


WAN = Family(
    "WanTransformer3DModel",
    roles_by_pattern(
        {
            **{"patch_embedding": Role.STEM, "proj_out": Role.HEAD, "condition_embedder.time_proj": Role.TIME_PROJ},
            "condition_embedder.time_embedder.linear_?": Role.TIME_EMBED,
            "condition_embedder.*_embedder.*": Role.TEXT_PROJ,
            **ATTENTION,
            **FEED_FORWARD,
        }
    ),
    blocks_by_pattern(
        {
            "condition_embedder.time_embedder": Kind.TEMPORAL,
            "condition_embedder.text_embedder": Kind.LAYER,
            "blocks.*": Kind.TRANSFORMER,
        }
    ),
    both("condition_embedder.time_embedder.linear_2", "condition_embedder.time_proj", wan_embedding),
    inputs=inputs_by_pattern(
        {"*.norm2": (("attn2.to_q",),)},
        {"*.norm1": (("attn1.to_[qkv]",),), "*.norm3": (("ffn.net.0.proj",),), "norm_out": (("proj_out",),)},
    ),
)

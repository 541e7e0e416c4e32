"""HunyuanVideo, whose text refiner has a time embedding of its own, and HunyuanDiT, with skips between its blocks."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from tfmq_exp.denoisers.families.adaln_zero import BLOCKS, ENDS, MODULATION, POOLED, READERS, SINGLE, adaln_zero
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

REFINER = "context_embedder.*"
REFINED = "context_embedder.time_text_embed.timestep_embedder"


def video_embedding(network: Any, t: Tensor, given: Conditions) -> Tensor:
    return network.time_text_embed(t, given["pooled_projections"], given.get("guidance"))[0]


def video_features(network: Any, projections: Sequence[str], t: Tensor, given: Conditions) -> dict[str, Tensor]:
    """Modulations of every block, and the refiner's embedding of the timestep, before its own of the text is added."""
    refiner = network.context_embedder.time_text_embed
    embedded = refiner.timestep_embedder(refiner.time_proj(t).to(given["pooled_projections"].dtype))
    own = f"{REFINED}.linear_2"
    return {own: embedded, **MODULATED.features(network, projections, t, given)}


def video_splits(network: Any) -> dict[str, int]:
    """The last layer of a single block reads attention's output and the feed-forward's one after the other."""
    width = network.config.num_attention_heads * network.config.attention_head_dim
    return {f"single_transformer_blocks.{i}.proj_out": width for i in range(len(network.single_transformer_blocks))}


# The refiner adds its text to its embedding of the timestep, and reads the sum: those layers are reconstructed inside it.
MODULATED = adaln_zero(
    "HunyuanVideoTransformer3DModel",
    {
        f"{REFINED}.linear_?": Role.TIME_EMBED,
        REFINER: Role.TEXT_PROJ,
        **POOLED,
        **ENDS,
        "x_embedder.proj": Role.STEM,
        **SINGLE,
        **MODULATION,
        **ATTENTION,
        **FEED_FORWARD,
    },
    video_embedding,
    ("pooled_projections", "guidance"),
    {**BLOCKS, "context_embedder": Kind.TRANSFORMER},
    video_splits,
    inputs_by_pattern(
        {
            **READERS,
            "*.refiner_blocks.*.norm1": (("attn.to_[qkv]",),),
            "*.refiner_blocks.*.norm2": (("ff.net.0.proj",),),
        }
    ),
)
HUNYUAN_VIDEO = replace(MODULATED, features=video_features)


def dit_features(network: Any, projections: Sequence[str], t: Tensor, given: Conditions) -> dict[str, Tensor]:
    """Shifts of every block, and of the last layer its scale, too; their SiLU is computed in single precision."""
    # the embedder views its sizes, which must not be an expanded row
    sizes = {name: given[name].contiguous() for name in ("image_meta_size", "style") if name in given}
    arguments: dict[str, Any] = {"image_meta_size": None, "style": None, **sizes}
    embedding = network.time_extra_emb(t, given["encoder_hidden_states_t5"], **arguments, hidden_dtype=t.dtype)
    active = nn.functional.silu(embedding.float()).to(embedding.dtype)
    return {name: network.get_submodule(name)(active) for name in projections}


def dit_splits(network: Any) -> dict[str, int]:
    """A block of the second half joins its input and that of a block of the first."""
    joined = [i for i, block in enumerate(network.blocks) if block.skip_linear is not None]
    return {f"blocks.{i}.skip_linear": network.inner_dim for i in joined}


HUNYUAN_DIT = Family(
    "HunyuanDiT2DModel",
    roles_by_pattern(
        {
            "time_extra_emb.timestep_embedder.linear_?": Role.TIME_EMBED,
            "time_extra_emb.*": Role.CONDITION_EMBED,
            **ENDS,
            "text_embedder.linear_?": Role.TEXT_PROJ,
            "*.skip_linear": Role.SHORTCUT,
            **MODULATION,
            **ATTENTION,
            **FEED_FORWARD,
        }
    ),
    blocks_by_pattern({"time_extra_emb": Kind.TEMPORAL, "text_embedder": Kind.LAYER, "blocks.*": Kind.TRANSFORMER}),
    dit_features,
    ("encoder_hidden_states_t5", "image_meta_size", "style"),
    dit_splits,
    inputs_by_pattern(
        {
            **dict.fromkeys(("*.norm1.norm", "*.norm1.linear"), (("attn1.to_[qkv]",),)),
            **{"*.norm2": (("attn2.to_q",),), "*.norm3": (("ff.net.0.proj",),)},
            **{"*.skip_norm": (("skip_linear",),), "norm_out.linear": (("proj_out",),)},
        }
    ),
)

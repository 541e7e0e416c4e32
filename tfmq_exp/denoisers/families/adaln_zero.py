"""Transformers with adaLN-zero: every block has a layer of its own that turns the embedding into shifts, scales and gates."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from tfmq_exp.denoisers.families.family import (
    ATTENTION,
    FEED_FORWARD,
    Conditions,
    Family,
    blocks_by_pattern,
    modulations,
    roles_by_pattern,
)
from tfmq_exp.denoisers.families.inputs import Inputs, Readers, inputs_by_pattern
from tfmq_exp.denoisers.structure import Kind, Role

Embedding = Callable[[Any, Tensor, Conditions], Tensor]  # (network, timesteps, conditions) -> input of the SiLU

POOLED = {  # embedder of the timestep and of what is added to it
    "*.timestep_embedder.linear_?": Role.TIME_EMBED,
    "time_*_embed.*_embedder.linear_?": Role.CONDITION_EMBED,
}
ENDS = {"x_embedder": Role.STEM, "pos_embed.proj": Role.STEM, "context_embedder": Role.TEXT_PROJ, "proj_out": Role.HEAD}
MODULATION = dict.fromkeys(
    ("*.norm.linear", "*.norm1.linear", "*.norm1_context.linear", "norm_out.linear"), Role.TIME_PROJ
)
READERS: Readers = {
    "*.norm.linear": (("attn.to_[qkv]", "proj_mlp"),),
    "*.norm1.linear": (("attn.to_[qkv]",), ("ff.net.0.proj", "ff.linear_[12]"), ("attn2.to_[qkv]",)),
    "*.norm1_context.linear": (("attn.add_[qkv]_proj",), ("ff_context.net.0.proj", "ff_context.linear_[12]")),
    "norm_out.linear": (("proj_out",),),
}
INPUTS = inputs_by_pattern(READERS)
BLOCKS = {
    "time_*_embed": Kind.TEMPORAL,
    "transformer_blocks.*": Kind.TRANSFORMER,
    "single_transformer_blocks.*": Kind.TRANSFORMER,
}


def adaln_zero(
    network: str,
    roles: Mapping[str, Role],
    embedding: Embedding,
    conditions: tuple[str, ...] = (),
    blocks: Mapping[str, Kind] = BLOCKS,
    splits: Callable[[Any], dict[str, int]] = lambda _network: {},
    inputs: Inputs = INPUTS,
) -> Family:
    """A family with one embedding and a modulation layer in every block.

    Args:
        network: name of its class.
        roles: of its layers by pattern.
        embedding: of the timestep and the conditions.
        conditions: names of the arguments that the embedding depends on beside the timestep.
        blocks: by pattern.
        splits: see `Family`.
        inputs: see `Family`.
    """

    def features(network: Any, projections: Sequence[str], t: Tensor, given: Conditions) -> dict[str, Tensor]:
        return modulations(network, projections, embedding(network, t, given))

    return Family(network, roles_by_pattern(roles), blocks_by_pattern(blocks), features, conditions, splits, inputs)


def sd3_embedding(network: Any, t: Tensor, given: Conditions) -> Tensor:
    return network.time_text_embed(t, given["pooled_projections"])


SD3 = adaln_zero(
    "SD3Transformer2DModel",
    {**POOLED, **ENDS, **MODULATION, **ATTENTION, **FEED_FORWARD},
    sd3_embedding,
    ("pooled_projections",),
)


def guided(network: Any, t: Tensor, given: Conditions) -> tuple[Tensor, ...]:
    """Timestep and guidance, where there is one, as FLUX embeds them: in thousandths, in the network's own precision."""
    dtype = next(network.parameters()).dtype
    numbers = (t, given["guidance"]) if "guidance" in given else (t,)
    return tuple(number.to(dtype) * 1000 for number in numbers)


def flux_embedding(network: Any, t: Tensor, given: Conditions) -> Tensor:
    return network.time_text_embed(*guided(network, t, given), given["pooled_projections"])


def flux_splits(network: Any) -> dict[str, int]:
    """The last layer of a single block reads attention's output and the feed-forward's one after the other."""
    return {
        f"single_transformer_blocks.{i}.proj_out": network.inner_dim
        for i in range(len(network.single_transformer_blocks))
    }


SINGLE = {"single_*.proj_mlp": Role.FEED_FORWARD, "single_*.proj_out": Role.FEED_FORWARD}
FLUX = adaln_zero(
    "FluxTransformer2DModel",
    {**POOLED, **ENDS, **SINGLE, **MODULATION, **ATTENTION, **FEED_FORWARD},
    flux_embedding,
    ("pooled_projections", "guidance"),
    splits=flux_splits,
)


def flux2_embedding(network: Any, t: Tensor, given: Conditions) -> Tensor:
    numbers = guided(network, t, given)
    return network.time_guidance_embed(*numbers, *[None] * (2 - len(numbers)))


FLUX2 = adaln_zero(
    "Flux2Transformer2DModel",
    {
        **POOLED,
        **ENDS,
        **MODULATION,
        "*_modulation*.linear": Role.TIME_PROJ,
        "*.attn.to_qkv_mlp_proj": Role.ATTN_QKV,
        "single_*.attn.to_out": Role.FEED_FORWARD,
        **ATTENTION,
        **dict.fromkeys(("*.linear_in", "*.linear_out"), Role.FEED_FORWARD),
    },
    flux2_embedding,
    ("guidance",),
    {**BLOCKS, "*_modulation*": Kind.TEMPORAL},
    lambda network: {
        f"single_transformer_blocks.{i}.attn.to_out": network.inner_dim
        for i in range(len(network.single_transformer_blocks))
    },
    inputs_by_pattern(
        {"norm_out.linear": (("proj_out",),)},
        {
            "*.norm": (("attn.to_qkv_mlp_proj",),),
            "*.norm1": (("attn.to_[qkv]",),),
            "*.norm1_context": (("attn.add_[qkv]_proj",),),
            "*.norm2": (("ff.linear_in",),),
            "*.norm2_context": (("ff_context.linear_in",),),
        },
    ),
)


def qwen_embedding(network: Any, t: Tensor, given: Conditions) -> Tensor:
    like = next(network.parameters())  # of whose precision the embedding is
    return network.time_text_embed(t.to(like.dtype), like)


QWEN_IMAGE = adaln_zero(
    "QwenImageTransformer2DModel",
    {
        **POOLED,
        **{"img_in": Role.STEM, "txt_in": Role.TEXT_PROJ, "proj_out": Role.HEAD},
        **dict.fromkeys(("*.img_mod.1", "*.txt_mod.1", "norm_out.linear"), Role.TIME_PROJ),
        **ATTENTION,
        **FEED_FORWARD,
    },
    qwen_embedding,
    inputs=inputs_by_pattern(
        {
            "*.img_mod.1": (("attn.to_[qkv]",), ("img_mlp.net.0.proj",)),
            "*.txt_mod.1": (("attn.add_[qkv]_proj",), ("txt_mlp.net.0.proj",)),
            "norm_out.linear": (("proj_out",),),
        }
    ),
)


def auraflow_embedding(network: Any, t: Tensor, given: Conditions) -> Tensor:
    return network.time_step_proj(network.time_step_embed(t).to(next(network.parameters()).dtype))


AURAFLOW = adaln_zero(
    "AuraFlowTransformer2DModel",
    {
        "time_step_proj.linear_?": Role.TIME_EMBED,
        **ENDS,
        **MODULATION,
        **ATTENTION,
        **dict.fromkeys(("*.ff.*", "*.ff_context.*"), Role.FEED_FORWARD),
    },
    auraflow_embedding,
    blocks={**BLOCKS, "time_step_proj": Kind.TEMPORAL, "joint_transformer_blocks.*": Kind.TRANSFORMER},
)


def cogvideox_embedding(network: Any, t: Tensor, given: Conditions) -> Tensor:
    return network.time_embedding(network.time_proj(t).to(next(network.parameters()).dtype))


COGVIDEOX = adaln_zero(
    "CogVideoXTransformer3DModel",
    {
        "time_embedding.linear_?": Role.TIME_EMBED,
        **{"patch_embed.proj": Role.STEM, "patch_embed.text_proj": Role.TEXT_PROJ, "proj_out": Role.HEAD},
        **MODULATION,
        "*.norm2.linear": Role.TIME_PROJ,
        **ATTENTION,
        **FEED_FORWARD,
    },
    cogvideox_embedding,
    blocks={**BLOCKS, "time_embedding": Kind.TEMPORAL},
    inputs=inputs_by_pattern(  # one half of a modulation is of the images, one of the text; the same layers read both
        {
            "*.norm1.linear": (("attn1.to_[qkv]",),) * 2,
            "*.norm2.linear": (("ff.net.0.proj",),) * 2,
            "norm_out.linear": (("proj_out",),),
        }
    ),
)


def lumina2_embedding(network: Any, t: Tensor, given: Conditions) -> Tensor:
    embedder = network.time_caption_embed
    return embedder.timestep_embedder(embedder.time_proj(t).to(next(network.parameters()).dtype))


LUMINA2 = adaln_zero(
    "Lumina2Transformer2DModel",
    {
        **POOLED,
        "time_caption_embed.caption_embedder.1": Role.TEXT_PROJ,
        **{"x_embedder": Role.STEM, "norm_out.linear_2": Role.HEAD, "norm_out.linear_1": Role.TIME_PROJ},
        **MODULATION,
        **ATTENTION,
        "*.feed_forward.linear_?": Role.FEED_FORWARD,
    },
    lumina2_embedding,
    blocks={
        "time_caption_embed.timestep_embedder": Kind.TEMPORAL,
        **dict.fromkeys(("context_refiner.*", "noise_refiner.*", "layers.*"), Kind.TRANSFORMER),
    },
    inputs=inputs_by_pattern(  # there are no shifts: an affine norm takes a scale as well as its modulation would
        {
            **dict.fromkeys(("*.norm1.norm", "context_refiner.*.norm1"), (("attn.to_[qkv]",),)),
            "*.ffn_norm1": (("feed_forward.linear_[13]",),),
            "norm_out.linear_1": (("norm_out.linear_2",),),
        }
    ),
)

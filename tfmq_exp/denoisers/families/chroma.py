"""Chroma: one network of the timestep returns a table with the modulations of all blocks."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from tfmq_exp.denoisers.families.adaln_zero import BLOCKS, ENDS, SINGLE, flux_splits
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

LAYER = "distilled_guidance_layer"


def features(network: Any, projections: Sequence[str], t: Tensor, given: Conditions) -> dict[str, Tensor]:
    """The table, [rows, modulations, channels]."""
    embedding = network.time_text_embed(t.to(next(network.parameters()).dtype) * 1000)
    return {f"{LAYER}.out_proj": network.distilled_guidance_layer(embedding)}


CHROMA = Family(
    "ChromaTransformer2DModel",
    roles_by_pattern(
        {
            f"{LAYER}.out_proj": Role.TIME_PROJ,
            f"{LAYER}.*": Role.TIME_EMBED,
            **ENDS,
            **SINGLE,
            **ATTENTION,
            **FEED_FORWARD,
        }
    ),
    blocks_by_pattern({LAYER: Kind.TEMPORAL, **BLOCKS}),
    features,
    splits=flux_splits,
    inputs=inputs_by_pattern(
        {},
        {
            "*.norm": (("attn.to_[qkv]", "proj_mlp"),),
            "*.norm1": (("attn.to_[qkv]",), ("ff.net.0.proj",)),
            "*.norm1_context": (("attn.add_[qkv]_proj",), ("ff_context.net.0.proj",)),
            "norm_out": (("proj_out",),),
        },
    ),
)

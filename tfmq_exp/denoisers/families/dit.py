"""DiT (arXiv 2212.09748) as diffusers has it: an embedder of the timestep and the class in every block."""

from collections.abc import Sequence
from typing import Any

from diffusers.models.embeddings import LabelEmbedding
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


def features(network: Any, projections: Sequence[str], t: Tensor, given: Conditions) -> dict[str, Tensor]:
    """Modulations of blocks, and of the last layer, which reads the first block's embedder."""
    dtype, blocks = next(network.parameters()).dtype, dict(enumerate(network.transformer_blocks))
    own = {i: name for i in blocks if (name := f"transformer_blocks.{i}.norm1.linear") in projections}
    last = ["proj_out_1"] if "proj_out_1" in projections else []
    read = {
        i: nn.functional.silu(blocks[i].norm1.emb(t, given["class_labels"], hidden_dtype=dtype))
        for i in blocks
        if i in own or (i == 0 and last)
    }
    found = {name: network.get_submodule(name)(read[i]) for i, name in own.items()}
    return found | {name: network.get_submodule(name)(read[0]) for name in last}


def keep_labels(network: nn.Module) -> None:
    """Turn off diffusers' own label dropout, in place: in training, each block would draw its own."""
    for module in network.modules():
        if isinstance(module, LabelEmbedding):
            module.dropout_prob = 0.0


DIT = Family(
    "DiTTransformer2DModel",
    roles_by_pattern(
        {
            "*.timestep_embedder.linear_?": Role.TIME_EMBED,
            **dict.fromkeys(("*.norm1.linear", "proj_out_1"), Role.TIME_PROJ),
            **{"pos_embed.proj": Role.STEM, "proj_out_2": Role.HEAD},
            **ATTENTION,
            **FEED_FORWARD,
        }
    ),
    blocks_by_pattern({"transformer_blocks.*": Kind.TRANSFORMER}),
    features,
    ("class_labels",),
    inputs=inputs_by_pattern(
        {
            "*.norm1.linear": (("attn1.to_[qkv]",), ("ff.net.0.proj",)),
            "proj_out_1": (("proj_out_2",),),
        }
    ),
)

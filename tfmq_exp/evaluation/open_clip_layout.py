"""Weights of open_clip, under the names of transformers' `CLIPModel`."""

import re
from collections.abc import Mapping

from torch import Tensor

TOWERS = {"visual.": "vision_model.", "": "text_model."}  # by the beginning of a name; the text tower's have none
# within a tower, by the beginning of the rest
PARTS = {
    "class_embedding": "embeddings.class_embedding",
    "positional_embedding": "embeddings.position_embedding.weight",
    "token_embedding.": "embeddings.token_embedding.",
    "conv1.": "embeddings.patch_embedding.",
    "ln_pre.": "pre_layrnorm.",  # transformers spells it so
    "ln_post.": "post_layernorm.",
    "ln_final.": "final_layer_norm.",
    "transformer.resblocks.": "encoder.layers.",
}
LAYER = {
    ".ln_1.": ".layer_norm1.",
    ".ln_2.": ".layer_norm2.",
    ".attn.": ".self_attn.",
    ".c_fc.": ".fc1.",
    ".c_proj.": ".fc2.",
}
PROJECTIONS = {"visual.proj": "visual_projection.weight", "text_projection": "text_projection.weight"}
JOINED = re.compile(r"(.*\.self_attn\.)in_proj_(weight|bias)")


def from_open_clip(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a two-tower model (`visual.`, and the text tower without a prefix) as those of a `CLIPModel`.

    Projections are transposed, since open_clip multiplies them from the right; one matrix for query, key and value becomes
    three. A name that is none of these stays as it is.
    """
    renamed: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if name in PROJECTIONS:
            renamed[PROJECTIONS[name]] = tensor.t()
        elif joined := JOINED.fullmatch(own := _rename(name)):
            parts = tensor.chunk(3)
            renamed |= {f"{joined[1]}{part}_proj.{joined[2]}": x for part, x in zip("qkv", parts, strict=True)}
        else:
            renamed[own] = tensor
    return renamed


def _rename(name: str) -> str:
    start = next(start for start in TOWERS if name.startswith(start))
    rest = name.removeprefix(start)
    part = next((part for part in PARTS if rest.startswith(part)), None)
    if part is None:
        return name
    rest = PARTS[part] + rest.removeprefix(part)
    for old, new in LAYER.items():
        rest = rest.replace(old, new)
    return TOWERS[start] + rest

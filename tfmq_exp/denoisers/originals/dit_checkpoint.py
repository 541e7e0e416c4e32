"""DiT's original checkpoints (arXiv 2212.09748, github.com/facebookresearch/DiT) as the network of diffusers.

Diffusers' class as it comes is another network: its sinusoid of the timestep has other frequencies. Here they are the original's,
and outputs agree with the original's to rounding.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import DiTTransformer2DModel
from diffusers.models.embeddings import PatchEmbed
from torch import Tensor

from tfmq_exp.core.finite import require_finite_weights
from tfmq_exp.core.validate import COUNT
from tfmq_exp.denoisers.loading.checkpoint import Checkpoint, assign_weights

TABLE = "pos_embed"  # of positions: computed by diffusers, kept by the original
NEAR = 1e-3  # of its values, which are sines: a file of half precision has them rounded
BLOCK = "transformer_blocks"
MLP_RATIO = 4.0  # of the width; diffusers has no setting for it
# The original's arguments, and what it takes without them.
DEFAULTS: dict[str, Any] = {
    **{"input_size": 32, "patch_size": 2, "in_channels": 4, "hidden_size": 1152, "depth": 28, "num_heads": 16},
    **{"mlp_ratio": MLP_RATIO, "class_dropout_prob": 0.1, "num_classes": 1000, "learn_sigma": True},
}
SIZES = ("input_size", "patch_size", "in_channels", "hidden_size", "depth", "num_heads", "num_classes")
# Published sizes of the paper's table 1: width, number of blocks, heads.
PUBLISHED = {"S": (384, 12, 6), "B": (768, 12, 12), "L": (1024, 24, 16), "XL": (1152, 28, 16)}
# The original's names -> diffusers', outside the blocks and inside.
TOP = {
    "x_embedder.proj": "pos_embed.proj",
    "final_layer.adaLN_modulation.1": "proj_out_1",
    "final_layer.linear": "proj_out_2",
}
INNER = {
    **{"adaLN_modulation.1": "norm1.linear", "attn.proj": "attn1.to_out.0"},
    **{"mlp.fc1": "ff.net.0.proj", "mlp.fc2": "ff.net.2"},
}
QKV = "attn.qkv"  # one layer there, three in diffusers
# What all blocks share in the original; every block of diffusers has its own.
SHARED = {
    "t_embedder.mlp.0": "norm1.emb.timestep_embedder.linear_1",
    "t_embedder.mlp.2": "norm1.emb.timestep_embedder.linear_2",
    "y_embedder.embedding_table": "norm1.emb.class_embedder.embedding_table",
}


def published(name: str, image_size: int) -> dict[str, Any]:
    """Arguments of the original's class for a published size such as `DiT-XL/2`, and images of so many pixels.

    Raises:
        ValueError: no such size.
    """
    found = re.fullmatch(r"DiT-(S|B|L|XL)/([248])", name)
    if found is None or image_size % 8:
        sizes = f"DiT-{{{', '.join(PUBLISHED)}}}/{{2, 4, 8}}"
        raise ValueError(f"expected {sizes} for images whose side 8 divides, got {name!r} for {image_size!r}")
    width, depth, heads = PUBLISHED[found[1]]
    sizes = {"patch_size": int(found[2]), "hidden_size": width, "depth": depth, "num_heads": heads}
    return {**DEFAULTS, **sizes, "input_size": image_size // 8}  # the first stage makes 8 pixels one


def original_frequencies(network: Any) -> None:
    """Give the sinusoids of a network of diffusers the original's frequencies: 10000^(-k/128), where it divides by 127."""
    for block in network.transformer_blocks:
        block.norm1.emb.time_proj.downscale_freq_shift = 0


def has_original_frequencies(network: Any) -> bool:
    """Whether a network is a DiT with the original's frequencies, which its configuration does not say."""
    if not isinstance(network, DiTTransformer2DModel):
        return False
    blocks: Any = network.transformer_blocks
    return all(block.norm1.emb.time_proj.downscale_freq_shift == 0 for block in blocks)


def empty_dit(arguments: Mapping[str, Any]) -> Any:
    """The network of diffusers for arguments of the original's class: parameters on the meta device, its table computed.

    Raises:
        ValueError: an argument that there is not, that cannot be, or that diffusers has no network for.
    """
    if unknown := sorted(arguments.keys() - DEFAULTS.keys()):
        raise ValueError(f"DiT has no argument {unknown[0]!r}; known: {', '.join(DEFAULTS)}")
    given = {**DEFAULTS, **arguments}
    if wrong := [key for key in SIZES if not COUNT.fits(given[key])]:
        raise ValueError(f"{wrong[0]} must be {COUNT.right}, got {given[wrong[0]]!r}")
    width, heads, side, patch = (given[key] for key in ("hidden_size", "num_heads", "input_size", "patch_size"))
    if width % heads or width % 4 or side % patch:
        wrong = f"hidden_size={width}, num_heads={heads}, input_size={side}, patch_size={patch}"
        raise ValueError(f"{wrong} do not go together: num_heads and 4 must divide hidden_size, patch_size input_size")
    if given["mlp_ratio"] != MLP_RATIO or not isinstance(given["learn_sigma"], bool) or not given["class_dropout_prob"]:
        kept = (
            f"mlp_ratio={MLP_RATIO}, learn_sigma true or false, and a class_dropout_prob above 0 (a row for no class)"
        )
        raise ValueError(f"expected {kept}, got { ({k: given[k] for k in given.keys() - set(SIZES)}) }")
    with torch.device("meta"):
        network: Any = DiTTransformer2DModel(
            num_attention_heads=heads,
            attention_head_dim=width // heads,
            in_channels=given["in_channels"],
            out_channels=given["in_channels"] * (1 + given["learn_sigma"]),
            num_layers=given["depth"],
            sample_size=side,
            patch_size=patch,
            num_embeds_ada_norm=given["num_classes"],
            norm_eps=1e-6,
        )
    table = PatchEmbed(height=side, width=side, patch_size=patch, in_channels=1, embed_dim=width).pos_embed
    network.pos_embed.pos_embed = table
    original_frequencies(network)
    return network


def convert_dit(state: Mapping[str, Tensor], depth: int) -> dict[str, Tensor]:
    """A state dict for diffusers' network of so many blocks from an original one; what has no place keeps its name."""
    found: dict[str, Tensor] = {}
    for key, value in state.items():
        module, _, kind = key.rpartition(".")
        place = re.fullmatch(r"blocks\.(\d+)\.(.+)", module)
        if module in SHARED:
            found |= {f"{BLOCK}.{i}.{SHARED[module]}.{kind}": value for i in range(depth)}
        elif place and place[2] == QKV and len(value) % 3 == 0:
            parts = zip("qkv", value.chunk(3), strict=True)
            found |= {f"{BLOCK}.{place[1]}.attn1.to_{name}.{kind}": part for name, part in parts}
        elif place and place[2] in INNER:
            found[f"{BLOCK}.{place[1]}.{INNER[place[2]]}.{kind}"] = value
        else:
            found[f"{TOP[module]}.{kind}" if module in TOP else key] = value
    return found


def load_dit(arguments: Mapping[str, Any], state: Mapping[str, Tensor]) -> Any:
    """Diffusers' network with an original's weights: float32, in evaluation mode, without gradients.

    Args:
        arguments: of the original's class (`published` has those of the paper); those left out are its defaults.
        state: by the original's names, without prefix.

    Raises:
        ValueError: an argument that is wrong (see `empty_dit`), or weights that are missing, unknown or of another shape.
    """
    depth = len({key.split(".")[1] for key in state if key.startswith("blocks.")})
    if depth != (expected := arguments.get("depth", DEFAULTS["depth"])):
        raise ValueError(f"the weights do not fit the architecture: {depth} blocks instead of depth={expected!r}")
    network, left = empty_dit(arguments), dict(state)
    own, table = network.pos_embed.pos_embed, left.pop(TABLE, torch.empty(0))
    wrong = "" if table.shape == own.shape else f"must have shape {tuple(own.shape)}, got {tuple(table.shape)}"
    if not (wrong or table.is_meta or torch.allclose(table.float(), own, atol=NEAR, rtol=0)):
        wrong = "holds other numbers than the sines and cosines of the positions"
    if wrong:
        raise ValueError(f"the weights do not fit the architecture: {TABLE} {wrong}")
    assign_weights(network, convert_dit(left, depth))
    return network


def read_dit(path: Path, arguments: Mapping[str, Any]) -> Any:
    """Diffusers' network from an original file, as published (bare averaged weights), or from the same as safetensors.

    Raises:
        FileNotFoundError: no such file.
        ValueError: another kind of file, weights of another architecture, or some that are not finite; names the file.
    """
    with Checkpoint(path) as file:
        state = file.tensors()
    try:
        network = load_dit(arguments, state)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    require_finite_weights(network, f"{path}: the weights")
    return network

"""Structure of diffusers' UNets: the only file that knows their attribute names."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import Attention
from diffusers.models.downsampling import Downsample2D
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from diffusers.models.upsampling import Upsample2D
from torch import Tensor, nn

from tfmq_exp.denoisers.structure import Block, Kind, LayerInfo, Role, UNetStructure

LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d)

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
}


def roles(unet: nn.Module) -> dict[str, Role]:
    """The role of every layer with weights; ValueError for one that has none here, of a kind of network not known here."""
    found = dict(ROLES_AT_TOP)
    for name, module in unet.named_modules():
        for path, role in ROLES_WITHIN.get(type(module), {}).items():
            found[f"{name}.{path}"] = role
    layers = [name for name, module in unet.named_modules() if isinstance(module, LAYERS)]
    if unknown := [name for name in layers if name not in found]:
        raise ValueError(f"no role is known for {len(unknown)} layers of {type(unet).__name__}, first {unknown[0]!r}")
    return {name: found[name] for name in layers}


def block_modules(unet: nn.Module) -> Iterator[tuple[str, Kind]]:
    """Modules that are reconstructed as a whole; a layer inside none of them is a block of its own."""
    yield "time_embedding", Kind.TEMPORAL
    outer = "."
    for name, module in unet.named_modules():
        if isinstance(module, ResnetBlock2D | BasicTransformerBlock | Attention) and not name.startswith(outer):
            outer = f"{name}."
            yield name, Kind.RESIDUAL if isinstance(module, ResnetBlock2D) else Kind.ATTENTION


@contextmanager
def after_each(unet: nn.Module, names: Iterable[str], visit: Callable[..., None]) -> Iterator[None]:
    """In passes without gradients, call `visit(name, module, inputs, output)` after each of these modules has run."""
    with torch.no_grad(), ExitStack() as hooks:
        for name in names:
            hooks.enter_context(unet.get_submodule(name).register_forward_hook(partial(visit, name)))
        yield


def read_structure(unet: nn.Module, example: Mapping[str, Any]) -> UNetStructure:
    """Layers, their cost, and blocks in execution order, from one traced forward pass.

    The order of attributes is not the order of execution in diffusers (mid blocks are registered last, attentions
    before the resnets that feed them), hence the trace.

    `example` has the keyword arguments of one forward pass, with a batch of one.
    """
    role_of = roles(unet)
    blocks = dict(block_modules(unet))
    inside = {layer: block for block in blocks for layer in role_of if layer.startswith(f"{block}.")}
    blocks |= {layer: Kind.LAYER for layer in role_of if layer not in inside}
    sizes = {name: unet.get_submodule(name).get_parameter("weight").numel() for name in role_of}
    macs, order = dict.fromkeys(role_of, 0), dict[str, tuple[str, ...]]()

    def count(name: str, layer: nn.Module, _: Any, output: Any) -> None:
        if name in role_of:
            channels = output.shape[1] if isinstance(layer, nn.Conv1d | nn.Conv2d) else output.shape[-1]
            macs[name] += output.numel() // channels * sizes[name]
        if name in blocks:
            order[name] = tuple(layer for layer in role_of if inside.get(layer, layer) == name)

    with after_each(unet, {**role_of, **blocks}, count):
        unet(**example)
    splits = shortcut_splits(unet)
    layers = {name: LayerInfo(name, role, sizes[name], macs[name], splits.get(name)) for name, role in role_of.items()}
    return UNetStructure(layers, tuple(Block(name, blocks[name], members) for name, members in order.items()))


def shortcut_splits(unet: Any) -> dict[str, int]:
    """Number of the trunk's channels in the input of each decoder shortcut: they come first, those of the skip follow."""
    found: dict[str, int] = {}
    trunk = (unet.mid_block or unet.down_blocks[-1]).resnets[-1].out_channels
    for i, block in enumerate(unet.up_blocks):
        for j, resnet in enumerate(block.resnets):
            if resnet.conv_shortcut is not None and trunk < resnet.in_channels:
                found[f"up_blocks.{i}.resnets.{j}.conv_shortcut"] = trunk
            trunk = resnet.out_channels
    return found


def time_embedding(unet: Any, t: Tensor) -> Tensor:
    """Input of every embedding projection: the time embedding after its activation, [steps, channels]."""
    # not `unet.dtype`, which walks over every parameter of the network
    sinusoid = unet.time_proj(t).to(next(unet.parameters()).dtype)
    embedding = unet.time_embedding(sinusoid)
    if getattr(unet, "time_embed_act", None) is not None:  # UNet2DModel has none
        embedding = unet.time_embed_act(embedding)
    # all residual blocks of a network have the same
    block = next(m for m in unet.modules() if isinstance(m, ResnetBlock2D) and m.time_emb_proj is not None)
    return embedding if block.skip_time_act else block.nonlinearity(embedding)


def attentions(unet: nn.Module) -> dict[str, Attention]:
    """Every attention module by name."""
    return {name: module for name, module in unet.named_modules() if isinstance(module, Attention)}


def set_heads(attention: Attention, heads: int) -> None:
    """Change the number of heads at the same width, which a diffusers configuration cannot always express."""
    width = attention.inner_dim // heads
    attention.heads, attention.sliceable_head_dim, attention.scale = heads, heads, width**-0.5

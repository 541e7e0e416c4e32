"""Structure of a denoiser: roles of its layers and blocks. No network library's attribute names."""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum


class Role(StrEnum):
    """Role of a linear or convolutional layer."""

    STEM = "stem"
    HEAD = "head"
    TIME_EMBED = "time_embed"
    TIME_PROJ = "time_proj"
    RES_CONV = "res_conv"
    SHORTCUT = "shortcut"
    DOWNSAMPLE = "downsample"
    UPSAMPLE = "upsample"
    ATTN_QKV = "attn_qkv"
    ATTN_OUT = "attn_out"
    FEED_FORWARD = "feed_forward"
    PROJECTION = "projection"
    TEXT_PROJ = "text_proj"  # of the words of a text, as every block reads them
    CONDITION_EMBED = "condition_embed"  # of what is added to the time embedding: pooled text, guidance, size


TEMPORAL_ROLES = frozenset({Role.TIME_EMBED, Role.TIME_PROJ})
# of the Temporal Information Block's layers, in order; the inputs of those that embed conditions do not depend on the timestep
TEMPORAL_INFORMATION = (Role.TIME_EMBED, Role.CONDITION_EMBED, Role.TIME_PROJ)


class Kind(StrEnum):
    """Kind of a block."""

    TEMPORAL = "temporal"
    RESIDUAL = "residual"
    ATTENTION = "attention"
    TRANSFORMER = "transformer"
    LAYER = "layer"


@dataclass(frozen=True)
class LayerInfo:
    """A layer with weights: its name in the network, its role, and how much of the network it is.

    `macs` counts multiply-accumulates for one sample. `split` is the number of channels at the start of the
    input that come from another tensor than the others: those of the trunk in the shortcut of a decoder block; None elsewhere.
    """

    name: str
    role: Role
    weights: int
    macs: int
    split: int | None = None


@dataclass(frozen=True)
class Block:
    """A module that is reconstructed as a whole, and the names of its layers."""

    name: str
    kind: Kind
    layers: tuple[str, ...]


@dataclass(frozen=True)
class NetworkStructure:
    """Every layer by name, and the blocks that partition them, in the order in which the network runs them."""

    layers: Mapping[str, LayerInfo]
    blocks: tuple[Block, ...]

    def by_role(self, *roles: Role) -> tuple[LayerInfo, ...]:
        return tuple(layer for layer in self.layers.values() if layer.role in roles)

    @property
    def temporal_layers(self) -> tuple[str, ...]:
        """The Temporal Information Block's layers: embeddings of time and of conditions first, then every projection of them."""
        return tuple(layer.name for role in TEMPORAL_INFORMATION for layer in self.by_role(role))

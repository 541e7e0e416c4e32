"""The record of a family of denoisers: roles of layers, blocks, and how temporal features are computed."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor, nn

from tfmq_exp.denoisers.families.inputs import Inputs
from tfmq_exp.denoisers.structure import Kind, Role

LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)

# Layers inside attention and feed-forward blocks, which have the same names in most transformers of diffusers.
ATTENTION = {
    **dict.fromkeys(("*.to_q", "*.to_k", "*.to_v", "*.add_[qkv]_proj"), Role.ATTN_QKV),
    **dict.fromkeys(("*.to_out.0", "*.to_add_out"), Role.ATTN_OUT),
}
FEED_FORWARD = dict.fromkeys(("*.net.0.proj", "*.net.2"), Role.FEED_FORWARD)

Conditions = Mapping[str, Tensor]  # further arguments of a network by name, `.` between the parts of a nested one


def hidden_width(network: Any) -> int:
    """Channels of a transformer's tokens, of which shifts, scales and gates have as many."""
    config = network.config
    return (
        config["hidden_size"]
        if "hidden_size" in config
        else config["num_attention_heads"] * config["attention_head_dim"]
    )


@dataclass(frozen=True)
class Family:
    """One architecture of diffusers.

    Args:
        network: name of its class.
        roles: network -> role of every layer with weights, see `roles_by_pattern`.
        blocks: network -> modules that are reconstructed as a whole, outermost first, with their kinds.
        features: (network, names of the layers with the role TIME_PROJ, timesteps of the rows, conditions of the rows) -> the
            temporal features by name: what blocks add or multiply, computed by the network's present layers from nothing
            else. A feature has the name of the layer that returns it.
        conditions: names of the arguments, beside the timestep, that temporal features depend on.
        splits: network -> number of the first input channels, of layers whose input joins two tensors, by name.
        inputs: network -> groups of layers that read one tensor, behind norms and modulation layers, see `inputs_by_pattern`.
        segment: network -> channels of a part of a feature that blocks use alike (a shift, a scale, a gate); None where a feature has
            no parts.
        lengths: name of the condition that masks a text, where the network cuts a batch to its longest text.
    """

    network: str
    roles: Callable[[nn.Module], dict[str, Role]]
    blocks: Callable[[nn.Module], Iterator[tuple[str, Kind]]]
    features: Callable[[Any, Sequence[str], Tensor, Conditions], dict[str, Tensor]]
    conditions: tuple[str, ...] = ()
    splits: Callable[[Any], dict[str, int]] = lambda _network: {}
    inputs: Inputs = lambda _network: iter(())
    segment: Callable[[Any], int | None] = hidden_width
    lengths: str | None = None

    def conditions_of(self, given: Iterable[str]) -> tuple[str, ...]:
        """Those of some arguments that temporal features depend on."""
        names = set(given)
        return tuple(name for name in self.conditions if name in names)


def layer_names(network: nn.Module) -> list[str]:
    """Names of all layers with weights, in the network's order of registration."""
    return [name for name, module in network.named_modules() if isinstance(module, LAYERS)]


def known_roles(network: nn.Module, found: Mapping[str, Role]) -> dict[str, Role]:
    """The found role of every layer; ValueError for a layer without one: a kind of network that is not known here."""
    layers = layer_names(network)
    if unknown := [name for name in layers if name not in found]:
        raise ValueError(
            f"no role is known for {len(unknown)} layers of {type(network).__name__}, first {unknown[0]!r}"
        )
    return {name: found[name] for name in layers}


def roles_by_pattern(patterns: Mapping[str, Role]) -> Callable[[nn.Module], dict[str, Role]]:
    """Roles by shell patterns of layer names; the first that fits counts."""

    def roles(network: nn.Module) -> dict[str, Role]:
        fitting = {
            name: next((role for pattern, role in patterns.items() if fnmatchcase(name, pattern)), None)
            for name in layer_names(network)
        }
        return known_roles(network, {name: role for name, role in fitting.items() if role is not None})

    return roles


def blocks_by_pattern(patterns: Mapping[str, Kind]) -> Callable[[nn.Module], Iterator[tuple[str, Kind]]]:
    """Blocks by shell patterns of module names; a module inside a block is none."""

    def blocks(network: nn.Module) -> Iterator[tuple[str, Kind]]:
        outer = "."
        for name, _ in network.named_modules():
            kind = next((kind for pattern, kind in patterns.items() if fnmatchcase(name, pattern)), None)
            if kind is not None and not name.startswith(outer):
                outer = f"{name}."
                yield name, kind

    return blocks


def modulations(network: nn.Module, projections: Sequence[str], embedding: Tensor) -> dict[str, Tensor]:
    """Outputs of these layers for one embedding, [rows, channels], through its SiLU.

    That is adaLN-zero (DiT, arXiv 2212.09748, section 3.2): shifts, scales and gates of every block.
    """
    active = nn.functional.silu(embedding)
    return {name: network.get_submodule(name)(active) for name in projections}

"""Every linear layer of a network in a group of those with one input."""

from collections.abc import Iterator, Mapping
from itertools import chain

from torch import nn

from tfmq_exp.denoisers.families.find import family_of
from tfmq_exp.denoisers.families.inputs import (
    InputGroup,
    attention_outputs,
    cross_attention_inputs,
    linear_layers,
    products,
)
from tfmq_exp.denoisers.structure import Role

EMBEDDER = "it is part of an embedder, which reads an argument of the network or the output of an activation"
REASONS = {
    **dict.fromkeys((Role.STEM, Role.TIME_EMBED, Role.CONDITION_EMBED, Role.TEXT_PROJ), EMBEDDER),
    Role.TIME_PROJ: "it reads the embedding after its activation",
    Role.FEED_FORWARD: "its input comes from an activation, through which no scale passes",
    Role.ATTN_QKV: "it reads the residual stream itself",
}
UNKNOWN = "nothing before it is known to take a scale"


def single_inputs(network: nn.Module, roles: Mapping[str, Role]) -> Iterator[InputGroup]:
    """Each layer alone, none of them free."""
    for name, layer in linear_layers(network).items():
        yield InputGroup((name,), layer.in_features, reason=REASONS.get(roles[name], UNKNOWN))


def input_groups(network: nn.Module) -> tuple[InputGroup, ...]:
    """Groups that partition the linear layers, those that are free and others.

    Layers whose weights are used but that never run (HunyuanDiT's pooler) are among them: no scale fits these, online or not.

    Raises:
        ValueError: a network of no known family, or with layers that no family's network has, as fused projections.
    """
    family, found = family_of(network), dict[str, InputGroup]()
    roles = family.roles(network)
    known = family.inputs(network), attention_outputs(network), products(network), cross_attention_inputs(network)
    for group in chain(*known, single_inputs(network, roles)):
        if found.keys().isdisjoint(group.layers):
            found |= dict.fromkeys(group.layers, group)
    return tuple(dict.fromkeys(found.values()))

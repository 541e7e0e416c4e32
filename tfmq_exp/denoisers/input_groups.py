"""Every linear layer of a network in a group of those with one input."""

from itertools import chain

from torch import nn

from tfmq_exp.denoisers.families.find import family_of
from tfmq_exp.denoisers.families.inputs import InputGroup, attention_outputs, linear_layers, products
from tfmq_exp.denoisers.structure import Role

EMBEDDER = "it is part of an embedder, which reads an argument of the network or the output of an activation"
REASONS = {
    **dict.fromkeys((Role.STEM, Role.TIME_EMBED, Role.CONDITION_EMBED, Role.TEXT_PROJ), EMBEDDER),
    Role.TIME_PROJ: "it reads the embedding after its activation",
    Role.FEED_FORWARD: "its input comes from an activation, through which no scale passes",
    Role.ATTN_QKV: "it reads the residual stream itself",
}
TEXT = "it reads a text that all blocks read"
UNKNOWN = "nothing before it is known to take a scale"


def input_groups(network: nn.Module) -> tuple[InputGroup, ...]:
    """Groups that partition the linear layers, free ones and others.

    Layers that never run (HunyuanDiT's pooler) are among the others.

    Raises:
        ValueError: a network of no known family, or with layers that no family's network has, as fused projections.
    """
    family = family_of(network)
    roles, layers = family.roles(network), linear_layers(network)
    found = list(chain(family.inputs(network), attention_outputs(network), products(network)))
    left = layers.keys() - {name for group in found for name in group.layers}
    for name in [name for name in layers if name in left]:
        attention, _, last = name.rpartition(".")
        pair = tuple(other for other in (f"{attention}.to_k", f"{attention}.to_v") if other in left)
        if last == "to_k" and len(pair) == 2:
            found.append(InputGroup(pair, layers[name].in_features, reason=TEXT))
        elif name not in pair or len(pair) < 2:
            found.append(InputGroup((name,), layers[name].in_features, reason=REASONS.get(roles[name], UNKNOWN)))
    return tuple(found)

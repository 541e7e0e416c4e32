"""Linear layers with one input, and the parameters that make it: those could scale its channels at no cost."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import chain
from types import MappingProxyType

from torch import nn

# Places of (shift, scale) in the output of a modulation layer, in widths, for each tensor that it modulates, by the class that cuts
# the output up. Other classes have a shift, a scale and a gate for each, or a shift and a scale.
SHIFT_SCALE_GATE = ((0, 1), (3, 4), (6, 7))
ORDERS: Mapping[str, tuple[tuple[int | None, int | None], ...]] = {
    "AdaLayerNormContinuous": ((1, 0),),
    "AuraFlowPreFinalBlock": ((1, 0),),
    "LuminaLayerNormContinuous": ((None, 0),),
    "AdaLayerNormShift": ((0, None),),
}
SHARED = "its shift and scale come from a layer that is not its own: other blocks read it, too"
PLAIN = "a norm without parameters makes it"
TEXT = "it reads a text that all blocks read"
GROUPED = "several of its heads share one head of values"


@dataclass(frozen=True)
class Rows:
    """Outputs of a linear layer, or channels of an affine norm, from `start` on, of which a group's input is made.

    `added` is 1 where the network adds 1 to them, as to the scales of adaLN, else 0.
    """

    module: str
    start: int = 0
    added: int = 0


@dataclass(frozen=True)
class InputGroup:
    """Linear layers whose inputs have one scale per channel.

    Args:
        layers: names of layers that read one tensor, or tensors that are made of the same values.
        channels: number of the first input channels that the group is about: all, but where a layer reads two joined tensors.
        rows: everything these channels are made of, linearly; empty where a scale is not free.
        reason: why it is not free; empty where it is.
    """

    layers: tuple[str, ...]
    channels: int
    rows: tuple[Rows, ...] = ()
    reason: str = ""


# Pattern of a norm or a modulation layer -> for each tensor it makes, patterns of the layers that read it, within the same block.
Readers = Mapping[str, tuple[tuple[str, ...], ...]]
Inputs = Callable[[nn.Module], Iterator[InputGroup]]


def linear_layers(network: nn.Module) -> dict[str, nn.Linear]:
    """Every linear layer by name."""
    return {name: module for name, module in network.named_modules() if isinstance(module, nn.Linear)}


def made_rows(network: nn.Module, name: str, width: int) -> tuple[tuple[Rows, ...], ...]:
    """Rows of each tensor that a modulation layer or an affine norm makes; none for a norm without parameters."""
    module = network.get_submodule(name)
    if not isinstance(module, nn.Linear):
        return () if getattr(module, "weight", None) is None else ((Rows(name),),)
    order = ORDERS.get(type(network.get_submodule(name.rpartition(".")[0])).__name__, SHIFT_SCALE_GATE)
    return tuple(
        tuple(Rows(name, place * width, added) for added, place in enumerate(places) if place is not None)
        for places in order
    )


def readers_within(network: nn.Module, readers: Readers) -> Iterator[tuple[str, int, tuple[str, ...]]]:
    """Every module that a pattern fits, with the layers that read each tensor it makes; none are keys and values of a text."""
    layers = linear_layers(network)
    fitting = [
        (name, pattern) for name, _ in network.named_modules() for pattern in readers if fnmatchcase(name, pattern)
    ]
    for name, pattern in fitting:
        block = name.removesuffix(pattern.rpartition("*")[2])
        for place, parts in enumerate(readers[pattern]):
            within = [f"{block}.{part}".removeprefix(".") for part in parts]
            found = [layer for layer in layers if any(fnmatchcase(layer, one) for one in within)]
            if reading := tuple(layer for layer in found if not of_text(network, layer)):
                yield name, place, reading


def inputs_by_pattern(readers: Readers, shared: Readers = MappingProxyType({})) -> Inputs:
    """Groups of layers behind norms and modulation layers.

    A layer that reads two tensors needs one scale for both, and one that reads what two modules make together needs rows of both.
    `shared` are norms whose shift and scale come from a layer that other blocks have, too: those who read them are not free.
    """

    def inputs(network: nn.Module) -> Iterator[InputGroup]:
        layers, found = linear_layers(network), dict[tuple[str, ...], list[tuple[Rows, ...]]]()
        for name, place, reading in readers_within(network, readers):
            if not isinstance(network.get_submodule(name), nn.Identity):
                made = made_rows(network, name, layers[reading[0]].in_features)
                found.setdefault(reading, []).append(made[place] if made else ())
        for reading, made in found.items():
            rows = tuple(chain(*made)) if all(made) else ()
            yield InputGroup(reading, layers[reading[0]].in_features, rows, "" if rows else PLAIN)
        for _, _, reading in readers_within(network, shared):
            yield InputGroup(reading, layers[reading[0]].in_features, reason=SHARED)

    return inputs


def of_text(network: nn.Module, name: str) -> bool:
    """Whether a layer makes keys or values of cross-attention."""
    attention, _, last = name.rpartition(".")
    return last in ("to_k", "to_v") and getattr(network.get_submodule(attention), "is_cross_attention", False)


def attention_outputs(network: nn.Module) -> Iterator[InputGroup]:
    """Groups behind attention, which averages values: its last layers, or where it has none, that of its block."""
    layers = linear_layers(network)
    for name, value in layers.items():
        attention, _, last = name.rpartition(".")
        if last == "to_v":
            own = [layer for layer in (f"{attention}.to_out.0", f"{attention}.to_add_out") if layer in layers]
            out = tuple(own or [f"{attention.rpartition('.')[0]}.proj_out"])
            values = [layer for layer in (name, f"{attention}.add_v_proj") if layer in layers]
            if own and layers[out[0]].in_features != value.out_features:
                yield InputGroup(out, layers[out[0]].in_features, reason=GROUPED)
            else:
                yield InputGroup(out, value.out_features, tuple(map(Rows, values)))
    for name, module in network.named_modules():
        if type(module).__name__ == "Flux2ParallelSelfAttention":  # queries, keys, values and feed-forward in one layer
            inner: int = module.inner_dim  # type: ignore[assignment]
            yield InputGroup((f"{name}.to_out",), inner, (Rows(f"{name}.to_qkv_mlp_proj", 2 * inner),))


def cross_attention_inputs(network: nn.Module) -> Iterator[InputGroup]:
    """Keys and values, which in cross-attention read a text."""
    layers = linear_layers(network)
    for name, key in layers.items():
        value = f"{name.rpartition('.')[0]}.to_v"
        if name.endswith(".to_k") and value in layers:
            yield InputGroup((name, value), key.in_features, reason=TEXT)


def products(network: nn.Module) -> Iterator[InputGroup]:
    """Groups behind a product of an activated half and one that is not, as in GEGLU and SwiGLU (arXiv 2002.05202)."""
    for name, module in network.named_modules():
        match type(module).__name__:
            case "FeedForward" if type(module.net[0]).__name__ in ("GEGLU", "SwiGLU"):  # type: ignore[index]
                last, other = "net.2", Rows(f"{name}.net.0.proj")
            case "AuraFlowFeedForward":
                last, other = "out_projection", Rows(f"{name}.linear_2")
            case "LuminaFeedForward":
                last, other = "linear_2", Rows(f"{name}.linear_3")
            case "Flux2FeedForward":
                last, other = "linear_out", Rows(f"{name}.linear_in", start=module.linear_out.in_features)  # type: ignore[union-attr]
            case _:
                continue
        yield InputGroup((f"{name}.{last}",), linear_layers(module)[last].in_features, (other,))

"""The manifest of a stored model: everything but its numbers, as plain data; and the model that a manifest describes."""

import dataclasses
import inspect
import json
from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import Any

import diffusers
import torch
from torch import Tensor, nn

from tfmq_exp.core.records import decode, encode
from tfmq_exp.denoisers.families.decoder import AUTOENCODERS, Decoder
from tfmq_exp.denoisers.families.find import FAMILIES
from tfmq_exp.denoisers.families.unet import attentions, set_heads
from tfmq_exp.denoisers.loading.network_config import LARGE, MOST_LAYERS, UNETS, WIDE, empty_network
from tfmq_exp.denoisers.loading.network_folder import check_numbers, reason_of, without_weights
from tfmq_exp.denoisers.loading.scheduler_config import default_settings
from tfmq_exp.denoisers.originals.dit_checkpoint import has_original_frequencies, original_frequencies
from tfmq_exp.denoisers.pipelines.text_components import TEXT_ENCODERS, empty_text_encoder, encoder_settings
from tfmq_exp.quant.layers import QuantizedWeight
from tfmq_exp.quant.observers import MinMax
from tfmq_exp.quant.scales.dynamic import DynamicGeneratorConfig
from tfmq_exp.quant.spec import QuantSpec
from tfmq_exp.quant.stored_features import Unneeded
from tfmq_exp.surgery.empty_features import CPU, empty_features, empty_integers
from tfmq_exp.surgery.quantized_network import QuantizedNetwork, quantize_in_place
from tfmq_exp.surgery.resolve import OPERANDS, STORED, ResolvedConfig

NETWORKS: dict[str, Any] = {family.network: getattr(diffusers, family.network) for family in FAMILIES} | AUTOENCODERS
MOST_TIMESTEPS = 2**20
WEIGHTS_PER_BYTE = 8  # at most: codes of 2 bits are four, and a few layers whose output is stored are in no file
# network, its configuration, what is quantized, shapes of the integers, numbers of heads, and how the model is sampled
ENTRIES = frozenset({"network", "config", "plan", "shapes", "cached", "unneeded", "heads", "recipe"})
# ranges without zero; sinusoids; shapes and kinds of the conditions that features are stored for, sizes of bases, and the number
# of weights that stored features replace
SOMETIMES = frozenset({"outside", "frequencies", "conditions", "bases", "replaced_weights"})
FREQUENCIES = {
    "frequencies": "original"
}  # of sinusoids: those of the original DiT, which no configuration of diffusers says


def stored_integers(model: QuantizedNetwork) -> dict[str, QuantizedWeight]:
    """All integer tensors by their names in the file: weights part by part, and cached temporal features."""
    weights = {f"weights/{layer}/{i}": part for layer, parts in model.integers.items() for i, part in enumerate(parts)}
    return weights | {f"cached/{layer}": feature.integers for layer, feature in model.stored_features.items()}


def inside(zero_point: Tensor, spec: QuantSpec) -> bool:
    """Whether every zero point is an integer of the grid."""
    return bool(((zero_point >= spec.qmin) & (zero_point <= spec.qmax)).all())


def class_and_settings(network: Any) -> tuple[str, dict[str, Any]]:
    """Name of the class of a network, of an autoencoder where it is one's decoder, and the settings that it is built of."""
    if (name := type(network).__name__) in TEXT_ENCODERS:
        return name, encoder_settings(network)
    name = network.autoencoder_class if isinstance(network, Decoder) else name
    known = inspect.signature(NETWORKS[name].__init__).parameters
    return name, {k: v for k, v in dict(network.config).items() if k in known}


def described(model: QuantizedNetwork) -> dict[str, Any]:
    """The manifest of a model, without its recipe."""
    name, settings = class_and_settings(model.network)
    integers, features = stored_integers(model), model.stored_features
    outside = [name for name, part in integers.items() if not inside(part.qparams.zero_point, part.spec)]
    manifest = {
        "network": name,
        "config": settings,
        "plan": encode(model.plan, STORED),
        "shapes": {name: list(part.codes.shape) for name, part in integers.items()},
        "cached": {layer: dataclasses.asdict(feature.spec) for layer, feature in features.items()},
        "unneeded": [name for name, module in model.network.named_modules() if isinstance(module, Unneeded)],
        # not always what the configuration says: the original networks have one number of heads at every width
        "heads": {name: module.heads for name, module in attentions(model.network).items()},
    }
    # ranges that do not contain zero, as in releases: no engine can execute them, so others may not have them unsaid
    manifest |= {"outside": outside} if outside else {}
    if model.context.conditions is not None:
        rows = model.context.conditions.rows.items()
        manifest["conditions"] = {name: [str(value.dtype), *value.shape] for name, value in rows}
    if bases := {layer: layout for layer, feature in features.items() if (layout := feature.layout())}:
        manifest["bases"] = bases
    manifest |= {"replaced_weights": model.replaced_weights} if features else {}
    return json.loads(json.dumps(manifest | (FREQUENCIES if has_original_frequencies(model.network) else {})))


def check_entries(manifest: Any) -> None:
    """ValueError for anything but the entries of a manifest; their content is compared with that of the model later."""
    if type(manifest) is not dict:
        raise ValueError(f"its manifest must be entries with values, got a {type(manifest).__name__}")
    if lacking := ENTRIES - manifest.keys():
        raise ValueError(f"its manifest lacks {min(lacking)!r}")
    if unknown := manifest.keys() - ENTRIES - SOMETIMES:
        raise ValueError(f"its manifest has an unknown entry {min(unknown)[:50]!r}")


def difference(given: Any, written: Any, place: str = "") -> str | None:
    """The place where plain data that was read differs from what the model made of it would write; None if nowhere.

    An entry without a reader, a default, or a number that was taken for another one would otherwise pass.
    """
    if type(given) is not type(written):
        return f"{place or 'all'} is {str(given)[:50]!r} instead of {str(written)[:50]!r}"
    if isinstance(given, dict):
        if unknown := given.keys() - written.keys():
            return f"{place}.{min(unknown)} is unknown".removeprefix(".")
        if lacking := written.keys() - given.keys():
            return f"{place}.{min(lacking)} is missing".removeprefix(".")
        found = (difference(given[key], written[key], f"{place}.{key}".removeprefix(".")) for key in given)
    elif isinstance(given, list) and len(given) == len(written):
        found = (difference(a, b, f"{place}[{i}]") for i, (a, b) in enumerate(zip(given, written, strict=True)))
    else:
        return None if given == written else f"{place} is {str(given)[:50]!r} instead of {str(written)[:50]!r}"
    return next((wrong for wrong in found if wrong), None)


def empty_transformer(
    kind: Any,
    config: Mapping[str, Any],
    available: int,
    device: torch.device = CPU,
    part: Callable[[Any], Any] = lambda network: network,
) -> Any:
    """A transformer, or a part of another network, with nothing in its parameters yet and its tables computed.

    Args:
        kind: class of diffusers.
        config: its settings.
        available: weights at most.
        device: of the parameters.
        part: of a network, that is kept.

    Raises:
        ValueError: settings that do not go together, or more than `available` weights.
    """
    check_numbers(config, max(available, WIDE))
    try:
        with without_weights(max(available, LARGE)), torch.device("meta"):
            kind.from_config(dict(config))  # first, for it takes no memory, whatever the settings are
        with without_weights(max(available, LARGE)):
            network = part(kind.from_config(dict(config))).eval()
    except Exception as error:  # settings that do not go together fail in any way
        raise ValueError(f"no {kind.__name__} can be built of these settings: {reason_of(error)}") from error
    if (needed := sum(value.numel() for value in network.parameters())) > available:
        raise ValueError(f"its settings describe {needed} weights, the file has room for {available}")
    for name, value in list(network.named_parameters()):
        owner, _, leaf = name.rpartition(".")
        empty = torch.empty(value.shape, device=device)
        setattr(network.get_submodule(owner), leaf, nn.Parameter(empty, requires_grad=False))
    return network


def empty_network_of(manifest: Mapping[str, Any], tensors: Mapping[str, Tensor], device: torch.device) -> Any:
    """The float network that a manifest describes, if its tensors can fill it, with nothing in its parameters yet.

    Text encoders and decoders have no attentions whose numbers of heads their settings do not say.
    """
    name, config = manifest["network"], manifest["config"]
    available = WEIGHTS_PER_BYTE * sum(value.nbytes for value in tensors.values())
    if name in TEXT_ENCODERS:
        return empty_text_encoder(name, config, available)
    if name not in NETWORKS:
        raise ValueError(f"unknown network {name!r}; known: {', '.join((*NETWORKS, *TEXT_ENCODERS))}")
    kind = NETWORKS[name]
    if unknown := config.keys() - default_settings(kind).keys():
        raise ValueError(f"config.{min(unknown)} is unknown")
    if name in AUTOENCODERS:
        return empty_transformer(kind, config, available, part=Decoder)
    if kind in UNETS:
        network: Any = empty_network(kind, config, available, most_layers=min(len(tensors), MOST_LAYERS))
        network.to_empty(device=CPU)
    else:
        network = empty_transformer(kind, config, available, device)
        if kind is diffusers.DiTTransformer2DModel and "frequencies" in manifest:
            original_frequencies(network)
    modules = attentions(network)
    if manifest["heads"].keys() != modules.keys():
        raise ValueError("its numbers of heads are not those of its attentions")
    for name, attention in modules.items():
        heads = manifest["heads"][name]
        if type(heads) is not int or heads < 1 or attention.inner_dim % heads:
            raise ValueError(f"heads of {name!r} must divide {attention.inner_dim}, got {heads!r}")
        set_heads(attention, heads)
    return network


def check_plan(plan: ResolvedConfig, numbers: int) -> None:
    """ValueError for timesteps that no sampler visits, and for networks that are larger than the file with their weights."""
    steps = plan.timesteps
    whole = all(type(t) is int and 0 <= t < MOST_TIMESTEPS for t in steps)
    real = all(type(t) is float and abs(t) < MOST_TIMESTEPS for t in steps)
    if not steps or len(set(steps)) < len(steps) or not (whole or real):
        expected = f"different integers of 0 .. {MOST_TIMESTEPS - 1}, or different real numbers"
        raise ValueError(f"'plan.timesteps' must be {expected}, got {str(steps)[:50]}")
    lines = [line for layer in plan.layers.values() for line in (layer.input, layer.output)]
    for operands in plan.operands.values():
        if unknown := operands.keys() - {*OPERANDS, "probabilities"}:
            raise ValueError(f"'plan.operands' has an unknown operand {min(unknown)!r}")
        lines += operands.values()
    for scale in (line.scale for line in lines if line):
        if isinstance(scale, DynamicGeneratorConfig):
            widths = (getattr(scale.encoding, "width", 1), *scale.hidden_dims, 1)
            if min(widths) < 1 or sum(a * b for a, b in pairwise(widths)) > numbers:
                raise ValueError(f"a network of statistics with layers of {widths[1:]} is not in the file")


def rebuilt(manifest: Mapping[str, Any], tensors: Mapping[str, Tensor], device: torch.device = CPU) -> QuantizedNetwork:
    """The model that a manifest describes, all its numbers still to be filled in; any error where there is none.

    Args:
        manifest: of the model.
        tensors: of its file, or others of their sizes.
        device: of weights and codes of a transformer; what is small is real on the meta device, too.
    """
    plan = decode(manifest["plan"], ResolvedConfig, STORED, "plan")
    numbers = sum(value.numel() for value in tensors.values())
    check_plan(plan, numbers)
    model = quantize_in_place(empty_network_of(manifest, tensors, device), plan, MinMax())
    for name in model.weight_layers():
        parts = model.layer(name).weight_parts()
        model.freeze(name, tuple(empty_integers(q.spec, tuple(part.shape), name, part.device) for q, part in parts))
    empty_features(model, manifest, numbers)
    return model

"""Stored temporal features as a manifest describes them, their numbers still to be filled in."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from tfmq_exp.denoisers.families.find import family_of
from tfmq_exp.denoisers.structure import TEMPORAL_ROLES, Role
from tfmq_exp.quant.condition_set import ConditionSet
from tfmq_exp.quant.layers import QuantizedWeight
from tfmq_exp.quant.spec import QParams, QuantSpec
from tfmq_exp.quant.stored_features import BasisFeature, CachedFeature
from tfmq_exp.surgery.quantized_network import QuantizedNetwork

CPU = torch.device("cpu")
KINDS = {
    str(kind): kind for kind in (torch.int64, torch.int32, torch.float64, torch.float32, torch.bfloat16, torch.float16)
}
EMBEDDINGS = frozenset({Role.TIME_EMBED, Role.CONDITION_EMBED})


def empty_integers(spec: QuantSpec, shape: tuple[int, ...], name: str, device: torch.device = CPU) -> QuantizedWeight:
    """Integers without content; ranges are real on every device."""
    if spec.bits > 8:
        raise ValueError(f"{name!r} must have at most 8 bits, got {spec.bits}")
    scale = torch.ones(spec.range_shape(shape))
    codes = torch.zeros(shape, dtype=torch.uint8, device=device)
    return QuantizedWeight(codes, QParams(scale, torch.zeros_like(scale)), spec)


def empty_features(model: QuantizedNetwork, manifest: Mapping[str, Any], numbers: int) -> None:
    """Put stored features in the place of the layers that compute them, which are no others.

    Args:
        model: as the manifest describes it without stored features.
        manifest: of the model.
        numbers: in the file.

    Raises:
        ValueError: a table of another size, or a layer that is missing or needed.
    """
    if "conditions" in manifest:
        model.context.conditions = empty_conditions(manifest["conditions"], numbers)
    if not (manifest["cached"] or manifest["unneeded"]):  # decoders and text encoders are of no family
        return
    known = family_of(model.network).roles(model.network)
    bases, cached = manifest.get("bases", {}), manifest["cached"]
    for layer, spec in cached.items():
        if known.get(layer) not in TEMPORAL_ROLES:
            raise ValueError(f"{layer!r} projects no temporal feature: it cannot be stored")
        shape = tuple(manifest["shapes"][f"cached/{layer}"])
        if layer in bases:
            empty_basis(model, layer, QuantSpec(**spec), shape, tuple(bases[layer]["coefficients"]), numbers)
        else:
            empty_table(model, layer, QuantSpec(**spec), shape)
    computed = [layer for layer, role in known.items() if role is Role.TIME_PROJ and layer not in cached]
    embeddings = {name for name, module in model.network.named_modules() if isinstance(module, nn.Embedding)}
    for layer in manifest["unneeded"]:
        if computed or not (known.get(layer) in EMBEDDINGS or layer in embeddings):
            raise ValueError(f"{layer!r} is needed: it cannot be left out")
        model.replace_layer(layer, None)


def empty_conditions(shapes: Mapping[str, Any], numbers: int) -> ConditionSet:
    """A finite set of conditions of these dtypes and shapes."""
    rows = {name: (KINDS.get(kind), shape) for name, (kind, *shape) in shapes.items()}
    for name, (kind, shape) in rows.items():
        if (
            kind is None
            or not shape
            or not all(type(size) is int and size > 0 for size in shape)
            or math.prod(shape) > numbers
        ):
            raise ValueError(
                f"conditions.{name} must be a dtype with the sizes of a tensor in the file, got {shapes[name]}"
            )
    return ConditionSet({name: torch.zeros(shape, dtype=kind) for name, (kind, shape) in rows.items()})


def empty_table(model: QuantizedNetwork, layer: str, spec: QuantSpec, shape: tuple[int, ...]) -> None:
    """A table by step and condition; ValueError for another size than all of them have."""
    pairs = model.context.num_steps * condition_count(model)
    (rows, columns), expected = shape, pairs * model.network.get_submodule(layer).out_features
    if rows < 1 or rows % pairs or rows * columns != expected:
        raise ValueError(
            f"the table of {layer!r} must have {expected} numbers in rows of steps, got {rows} x {columns}"
        )
    model.replace_layer(layer, CachedFeature(empty_integers(spec, shape, layer), model.context))


def empty_basis(
    model: QuantizedNetwork,
    layer: str,
    spec: QuantSpec,
    shape: tuple[int, ...],
    coefficients: tuple[int, ...],
    numbers: int,
) -> None:
    """A basis of a layer's features with coefficients over time.

    Args:
        model: that gets it.
        layer: that it replaces.
        spec: of its integers.
        shape: of its integers.
        coefficients: points, conditions and rank.
        numbers: in the file.

    Raises:
        ValueError: sizes that do not go together.
    """
    (rows, columns), (points, conditions, rank) = shape, coefficients
    width = model.network.get_submodule(layer).out_features
    if (
        min(points, rank) < 1
        or conditions != condition_count(model)
        or math.prod(coefficients) > numbers
        or rows != rank + 1
    ):
        raise ValueError(
            f"a basis of {rows - 1} vectors has coefficients [points, conditions, vectors], got {coefficients}"
        )
    if columns != width:
        raise ValueError(f"the basis of {layer!r} must have vectors of {width} channels, got {columns}")
    # distinct timesteps: those of the file are compared with nothing until they are filled in
    empty = torch.arange(points), torch.zeros(coefficients)
    model.replace_layer(layer, BasisFeature(empty_integers(spec, shape, layer), *empty, model.context))


def condition_count(model: QuantizedNetwork) -> int:
    """Number of conditions that features are stored for; 1 where they depend on the timestep alone."""
    return 1 if model.context.conditions is None else len(model.context.conditions)


def check_stored(model: QuantizedNetwork) -> None:
    """ValueError for a basis whose timesteps do not ascend."""
    for layer, feature in model.stored_features.items():
        if isinstance(feature, BasisFeature) and not bool((feature.timesteps.diff() > 0).all()):
            raise ValueError(f"the timesteps of the basis of {layer!r} must ascend")

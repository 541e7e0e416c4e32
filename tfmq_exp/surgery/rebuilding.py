"""A quantized network from the manifest and the tensors of a file, all of which are checked."""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from tfmq_exp.denoisers.loading.network_config import MOST_LAYERS, UNETS, empty_network
from tfmq_exp.denoisers.loading.scheduler_config import default_settings
from tfmq_exp.denoisers.structure import Role
from tfmq_exp.denoisers.unet import attentions, roles, set_heads
from tfmq_exp.quant.layers import QuantizedWeight
from tfmq_exp.quant.observers import MinMax
from tfmq_exp.quant.quantizers import Mode
from tfmq_exp.quant.scales.dynamic import DynamicGeneratorConfig
from tfmq_exp.quant.spec import QParams, QuantSpec
from tfmq_exp.surgery.build import build_quantized_unet
from tfmq_exp.surgery.manifest import described, difference, inside
from tfmq_exp.surgery.packing import unpack
from tfmq_exp.surgery.quantized_unet import QuantizedUNet
from tfmq_exp.surgery.resolve import OPERANDS, ResolvedConfig, resolved_from_json

NETWORKS: dict[str, Any] = {kind.__name__: kind for kind in UNETS}
MOST_TIMESTEPS = 2**20
WEIGHTS_PER_BYTE = 8  # at most: codes of 2 bits are four, and a few layers whose output is stored are in no file


class StoredTensors:
    """The tensors of a file, each of which is taken exactly once; ValueError for one that is missing, left over or unfit."""

    def __init__(self, tensors: Mapping[str, Tensor], outside: Sequence[str]) -> None:
        self.tensors, self.outside = dict(tensors), outside

    def take(self, key: str, *dtypes: torch.dtype) -> Tensor:
        """One tensor of finite numbers, of one of these types."""
        if key not in self.tensors:
            raise ValueError(f"it lacks {key!r}")
        value = self.tensors.pop(key)
        if value.dtype not in dtypes:
            raise ValueError(f"{key!r} must be {' or '.join(map(str, dtypes))}, got {value.dtype}")
        if not bool(value.isfinite().all()):
            raise ValueError(f"{key!r} has numbers that are not finite")
        return value

    def scale(self, key: str) -> Tensor:
        """A table of scales."""
        value = self.take(key, torch.float32)
        if not bool((value > 0).all()):
            raise ValueError(f"{key!r} must be positive, got {float(value.min()):g}")
        return value

    def zero_point(self, key: str, spec: QuantSpec, within: bool = True) -> Tensor:
        """A table of zero points: integers, `within` the grid."""
        value = self.take(key, torch.uint8, torch.float32).float()
        if not bool((value == value.round()).all()):
            raise ValueError(f"{key!r} must be integers")
        if within and not inside(value, spec):
            ends = f"{float(value.min()):g} .. {float(value.max()):g}"
            raise ValueError(f"{key!r} must lie within the grid {spec.qmin} .. {spec.qmax}, got {ends}")
        return value

    def integers(self, name: str, spec: QuantSpec, shape: tuple[int, ...]) -> QuantizedWeight:
        """The integers of a tensor of this shape, as `serialization.stored_tensors` packed them."""
        if spec.bits > 8:
            raise ValueError(f"{name!r} must have at most 8 bits, got {spec.bits}")
        scale = self.scale(f"{name}/scale").reshape(spec.range_shape(shape))
        zero_point = torch.zeros_like(scale)
        if spec.scheme == "affine":
            stored = self.zero_point(f"{name}/zero_point", spec, name not in self.outside)
            zero_point = stored.reshape(scale.shape)
        codes = unpack(self.take(f"{name}/codes", torch.uint8), spec.bits, shape)
        return QuantizedWeight(codes, QParams(scale, zero_point), spec)

    def require_all_taken(self) -> None:
        if self.tensors:
            count, first = len(self.tensors), min(self.tensors)
            raise ValueError(f"it holds {count} tensors that the model has no place for, first {first!r}")


def empty_unet(manifest: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Any:
    """The float network that a manifest describes, if its tensors can fill it, with nothing in its parameters yet."""
    if manifest["network"] not in NETWORKS:
        raise ValueError(f"unknown network {manifest['network']!r}; known: {', '.join(NETWORKS)}")
    kind, config = NETWORKS[manifest["network"]], manifest["config"]
    if unknown := config.keys() - default_settings(kind).keys():
        raise ValueError(f"config.{min(unknown)} is unknown")
    available = WEIGHTS_PER_BYTE * sum(value.nbytes for value in tensors.values())
    unet: Any = empty_network(kind, config, available, most_layers=min(len(tensors), MOST_LAYERS))
    unet.to_empty(device="cpu")
    modules = attentions(unet)
    if manifest["heads"].keys() != modules.keys():
        raise ValueError("its numbers of heads are not those of its attentions")
    for name, attention in modules.items():
        heads = manifest["heads"][name]
        if type(heads) is not int or heads < 1 or attention.inner_dim % heads:
            raise ValueError(f"heads of {name!r} must divide {attention.inner_dim}, got {heads!r}")
        set_heads(attention, heads)
    return unet


def fill_weights(model: QuantizedUNet, stored: StoredTensors) -> dict[str, Tensor]:
    """Freeze every weight of the plan to the stored integers; returns the real weights, by the names in the network."""
    state: dict[str, Tensor] = {}
    for name in model.weight_layers():
        layer = model.layer(name)
        parts = [(quantizer.spec, tuple(part.shape)) for quantizer, part in layer.weight_parts()]
        found = [stored.integers(f"weights/{name}/{i}", spec, shape) for i, (spec, shape) in enumerate(parts)]
        model.freeze(name, tuple(found))
        state |= {f"{name}.{key}": value for key, value in layer.integers.state_dict(prefix="integers.").items()}
        state[f"{name}.weight"] = layer.weight
    return state


def fill_features(
    model: QuantizedUNet, manifest: Mapping[str, Any], stored: StoredTensors, known: Mapping[str, Role]
) -> None:
    """Put stored temporal features in the place of the layers that compute them, which are no others.

    Args:
        model: the rebuilt network.
        manifest: its `cached` layers with their specs, and its `unneeded` ones.
        stored: integers of the features, [steps, channels].
        known: role of each layer with weights.

    Raises:
        ValueError: a layer that computes no temporal feature, or one that is still needed.
    """
    for layer, spec in manifest["cached"].items():
        if known.get(layer) is not Role.TIME_PROJ:
            raise ValueError(f"{layer!r} projects no temporal feature: it cannot be stored")
        shape = (model.context.num_steps, model.unet.get_submodule(layer).out_features)
        model.cache_feature(layer, stored.integers(f"cached/{layer}", QuantSpec(**spec), shape))
    computed = [layer for layer, role in known.items() if role is Role.TIME_PROJ and layer not in manifest["cached"]]
    for layer in manifest["unneeded"]:
        if known.get(layer) is not Role.TIME_EMBED or computed:
            raise ValueError(f"{layer!r} is needed: it cannot be left out")
        model.drop(layer)


def check_plan(plan: ResolvedConfig, numbers: int) -> None:
    """ValueError for timesteps that no sampler visits, and for networks that are larger than the file with their weights."""
    steps = plan.timesteps
    if not steps or len(set(steps)) < len(steps) or not all(type(t) is int and 0 <= t < MOST_TIMESTEPS for t in steps):
        expected = f"different integers of 0 .. {MOST_TIMESTEPS - 1}"
        raise ValueError(f"'plan.timesteps' must be {expected}, got {str(steps)[:50]}")
    for name, layer in plan.layers.items():
        if layer.split is not None and not (type(layer.split) is int and layer.split > 0):
            raise ValueError(f"'plan.layers.{name}.split' must be a number of channels")
    parts = {part for lines in plan.operands.values() for part in lines}
    if unknown := parts - {*OPERANDS, "probabilities"}:
        raise ValueError(f"'plan.operands' has an unknown operand {min(unknown)!r}")
    lines = [line for layer in plan.layers.values() for line in (layer.input, layer.output)]
    for line in (*lines, *(line for parts in plan.operands.values() for line in parts.values())):
        scale = line.scale if line else None
        if isinstance(scale, DynamicGeneratorConfig):
            widths = (getattr(scale.encoding, "width", 1), *scale.hidden_dims, 1)
            if min(widths) < 1 or sum(a * b for a, b in pairwise(widths)) > numbers:
                raise ValueError(f"a network of statistics with layers of {widths[1:]} is not in the file")


def rebuilt(manifest: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> QuantizedUNet:
    """The model that a manifest describes, with its tensors; any error where they do not fit."""
    stored = StoredTensors(tensors, manifest.get("outside", ()))
    plan = resolved_from_json(manifest["plan"])
    check_plan(plan, sum(value.numel() for value in tensors.values()))
    unet = empty_unet(manifest, tensors)
    model = build_quantized_unet(unet, plan, MinMax())
    state = fill_weights(model, stored)
    fill_features(model, manifest, stored, roles(unet))
    for name, quantizer in model.activation_quantizers().items():
        for key in quantizer.state_dict():
            part = f"activations/{name}/{key.removeprefix('scale_provider.')}"
            if key == "scale_provider.scale":
                state[f"{name}.{key}"] = stored.scale(part)
            elif key == "scale_provider.zero_point":
                state[f"{name}.{key}"] = stored.zero_point(part, quantizer.spec)
            else:
                state[f"{name}.{key}"] = stored.take(part, torch.float32)
    for name, value in model.unet.state_dict().items():
        if name not in state:
            state[name] = stored.take(f"float/{name}", value.dtype)
    stored.require_all_taken()
    model.unet.load_state_dict(state, strict=True)
    model.set_activations(Mode.QUANTIZE)
    if wrong := difference({entry: value for entry, value in manifest.items() if entry != "recipe"}, described(model)):
        raise ValueError(f"its manifest is not that of the model: {wrong}")
    return model

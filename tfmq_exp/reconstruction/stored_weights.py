"""Weights of networks that are not in memory: float ones in safetensors files, integers in checkpoints of units."""

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import nn

from tfmq_exp.denoisers.loading.meta_network import loaded_part, skeleton
from tfmq_exp.denoisers.loading.sharded_weights import META, ShardedWeights, release_parameters, set_parameters
from tfmq_exp.denoisers.read_structure import after_each
from tfmq_exp.quant.layers import QuantizedWeight, QuantLayer
from tfmq_exp.reconstruction.units import Unit
from tfmq_exp.surgery.quantized_unet import QuantizedUNet


class IntegerWeights(Protocol):
    """Integer weights that finished units have learned."""

    def layers(self) -> frozenset[str]:
        """Names of their layers."""
        ...

    def read(self, layers: Collection[str]) -> Mapping[str, tuple[QuantizedWeight, ...]]:
        """Integers of those of some layers that have any."""
        ...


@dataclass(frozen=True)
class StoredWeights:
    """Sources of the weights of networks whose parameters are on the meta device: float ones, and integers."""

    shards: ShardedWeights
    integers: IntegerWeights


@dataclass
class LoadedParts:
    """The parts of a float network and its quantized copy that are in memory. Without `stored` all of them always are.

    Args:
        model: quantized network.
        float_unet: float network; None where it is not needed.
        stored: sources of what is not in memory.
        device: of what is loaded.
        learned: layers that some unit learns; others are rounded to nearest.
        finished: layers whose weights are integers.
    """

    model: QuantizedUNet
    float_unet: nn.Module | None
    stored: StoredWeights | None
    device: torch.device
    learned: frozenset[str]
    finished: set[str] = field(default_factory=set)
    nearest: dict[str, nn.Module] = field(default_factory=dict)  # weight quantizers of what is rounded to nearest

    @property
    def any_network(self) -> nn.Module:
        """The float network, or the quantized one, which has the same names."""
        return self.model.unet if self.float_unet is None else self.float_unet

    def traced(self, network: nn.Module) -> nn.Module:
        """A network to trace: itself, or its copy on the meta device."""
        return network if self.stored is None else skeleton(network)

    def parameters_of(self, unit: Unit, example: Any = ()) -> list[str]:
        """Names of the parameters that a unit uses; `example` are arguments on the meta device, for a view of the network."""
        if self.stored is None:
            return []
        network = self.any_network
        if unit.driver == "denoiser":
            return [f"{unit.name}.{name}" for name, _ in network.get_submodule(unit.name).named_parameters()]
        outline, ran = skeleton(network), list[str]()
        owners = [name for name, module in outline.named_modules() if own_parameters(module)]
        with after_each(outline, owners, lambda name, *_: ran.append(name)):
            unit.module(outline)(*example)
        return [f"{name}.{own}" for name in dict.fromkeys(ran) for own in own_parameters(network.get_submodule(name))]

    def parameters_outside(self, units: Collection[str]) -> list[str]:
        """Names of the float network's parameters that are in none of some modules."""
        inside = tuple(f"{unit}." for unit in units)
        names = [name for name, parameter in self.any_network.named_parameters() if parameter.is_meta]
        return [name for name in names if not name.startswith(inside)]

    def view(self, unit: Unit, parameters: Collection[str]) -> Unit:
        """The unit, of which a view of the whole network becomes one of the loaded modules alone."""
        if self.stored is None or unit.driver == "denoiser":
            return unit
        modules = dict.fromkeys(name.rpartition(".")[0] for name in parameters)
        return replace(unit, module=lambda network: unit.module(loaded_part(network, modules)))

    @contextmanager
    def loaded(self, parameters: Collection[str], learning: Collection[str] = ()) -> Iterator[None]:
        """Have these parameters in memory inside the block, in the quantized network as integers where they are finished.

        `learning` are layers that become integers there: their quantizers get ranges.
        """
        if self.stored is None:
            yield
            return
        parameters = [name for name in parameters if self.model.unet.get_parameter(name).is_meta]
        known = {layer for name in parameters if (layer := name.removesuffix(".weight")) in self.finished}
        floats = [name for name in parameters if name.removesuffix(".weight") not in known]
        read = self.stored.shards.read(floats if self.float_unet is None else parameters)
        tensors = {name: tensor.to(self.device) for name, tensor in read.items()}
        if self.float_unet is not None:
            set_parameters(self.float_unet, tensors)
        set_parameters(self.model.unet, {name: tensors[name] for name in floats})
        del read, tensors
        self.restore(known)
        for name in floats:
            layer = name.removesuffix(".weight")
            if layer in self.model.weight_layers() and (layer in learning or layer not in self.learned):
                self.prepare(layer)
        try:
            yield
        finally:
            self.release(parameters)

    def restore(self, layers: Collection[str]) -> None:
        """Give layers their integers; ValueError where no checkpoint has them."""
        assert self.stored is not None
        integers = self.stored.integers.read(layers) if layers else {}
        if missing := set(layers).difference(integers):
            raise ValueError(f"no checkpoint has the integer weight of {min(missing)}")
        for name, parts in integers.items():
            layer = self.model.layer(name)
            layer.weight = nn.Parameter(torch.empty_like(layer.weight, device=self.device), requires_grad=False)
            self.model.freeze(name, tuple(on_device(part, self.device) for part in parts))

    def prepare(self, name: str) -> None:
        """Set the ranges of a layer's weight, and round it to nearest where no unit learns it."""
        quantizer = self.model.layer(name).weight_quantizer.to_empty(device=self.device)
        self.model.calibrate_weights([name])
        if name not in self.learned:
            self.nearest[name] = quantizer
            self.model.freeze(name)

    def release(self, parameters: Collection[str]) -> None:
        """Free the memory of some parameters, of their integers and quantizers."""
        if self.float_unet is not None:
            release_parameters(self.float_unet, parameters)
        release_parameters(self.model.unet, parameters)
        for name in parameters:
            layer = self.model.unet.get_submodule(name.rpartition(".")[0])
            if isinstance(layer, QuantLayer):
                if quantizer := self.nearest.pop(name.removesuffix(".weight"), None):
                    layer.weight_quantizer, layer.integers = quantizer, nn.ModuleList()  # type: ignore[assignment]
                layer.weight_quantizer.to(META)
                layer.integers.to(META)


def own_parameters(module: nn.Module) -> list[str]:
    """Names of the parameters that a module has itself."""
    return [name for name, _ in module.named_parameters(recurse=False)]


def on_device(weight: QuantizedWeight, device: torch.device) -> QuantizedWeight:
    qparams = type(weight.qparams)(*(x.to(device) for x in weight.qparams))
    return weight._replace(codes=weight.codes.to(device), qparams=qparams)

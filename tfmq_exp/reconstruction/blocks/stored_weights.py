"""Weights of networks that are not in memory: float ones in safetensors files, integers in checkpoints of units."""

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Protocol

import torch
from torch import nn

from tfmq_exp.denoisers.loading.meta_network import loaded_part, skeleton
from tfmq_exp.denoisers.loading.sharded_weights import META, ShardedWeights, release_parameters, set_parameters
from tfmq_exp.quant.layers import QuantizedWeight, QuantLayer
from tfmq_exp.reconstruction.units import Unit
from tfmq_exp.surgery.quantized_network import QuantizedNetwork


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
        outline: float network to trace, see `outline_of`.
        floats: float networks that get weights, too; none where they are not needed.
        stored: sources of what is not in memory.
        device: of what is loaded.
        learned: layers that some unit learns; others are rounded to nearest.
        finished: layers whose weights are integers.
    """

    model: QuantizedNetwork
    outline: nn.Module
    floats: tuple[nn.Module, ...]
    stored: StoredWeights | None
    device: torch.device
    learned: frozenset[str]
    finished: set[str] = field(default_factory=set)
    nearest: dict[str, nn.Module] = field(default_factory=dict)  # weight quantizers of what is rounded to nearest

    def parameters_inside(self, unit: Unit) -> list[str]:
        """Names of the parameters inside a unit's module."""
        names = [name for name, _ in self.outline.get_submodule(unit.name).named_parameters()]
        return [f"{unit.name}.{name}" for name in names] if self.stored else []

    def parameters_of(self, run: Callable[[nn.Module], object]) -> list[str]:
        """Names of the parameters of all modules that take part in what `run` does with the network to trace."""
        used = dict[str, None]()
        if self.stored is None:
            return []

        def note(prefix: str, module: nn.Module, _: object) -> None:
            own = [name for name, _ in module.named_parameters(recurse=False) if "forward" not in vars(module)]
            used.update({f"{prefix}.{name}" if prefix else name: None for name in own})  # unless it is `skipped`

        with ExitStack() as hooks:
            for name, module in self.outline.named_modules():
                hooks.enter_context(module.register_forward_pre_hook(partial(note, name)))
            run(self.outline)
        return list(used)

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
        known = {layer for name in parameters if (layer := name.removesuffix(".weight")) in self.finished}
        floats = [name for name in parameters if name.removesuffix(".weight") not in known]
        read = self.stored.shards.read(parameters if self.floats else floats)
        tensors = {name: tensor.to(self.device) for name, tensor in read.items()}
        for network in self.floats:
            set_parameters(network, tensors)
        set_parameters(self.model.network, {name: tensors[name] for name in floats})
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
        for network in (*self.floats, self.model.network):
            release_parameters(network, parameters)
        for name in parameters:
            layer = self.model.network.get_submodule(name.rpartition(".")[0])
            if isinstance(layer, QuantLayer):
                if quantizer := self.nearest.pop(name.removesuffix(".weight"), None):
                    layer.weight_quantizer, layer.integers = quantizer, nn.ModuleList()  # type: ignore[assignment]
                layer.weight_quantizer.to(META)
                layer.integers.to(META)


def outline_of(network: nn.Module, stored: StoredWeights | None) -> nn.Module:
    """A network to trace: itself where it is in memory, else its copy on the meta device."""
    return network if stored is None else skeleton(network)


def on_device(weight: QuantizedWeight, device: torch.device) -> QuantizedWeight:
    qparams = type(weight.qparams)(*(x.to(device) for x in weight.qparams))
    return weight._replace(codes=weight.codes.to(device), qparams=qparams)

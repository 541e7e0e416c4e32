"""A quantized network some of whose units are those of the float one."""

from collections.abc import Collection, Generator
from contextlib import contextmanager
from dataclasses import dataclass

from torch import nn

from tfmq_exp.denoisers.structure import Kind, UNetStructure
from tfmq_exp.quant.layers import QuantLayer
from tfmq_exp.quant.quantizers import Mode, Quantizer, modes
from tfmq_exp.reconstruction.units import TemporalAware
from tfmq_exp.surgery.quantized_unet import QuantizedUNet


@dataclass(frozen=True)
class QuantizedUnit:
    """A unit of the network: its layers, and the attentions inside it whose operands are quantized."""

    name: str
    kind: Kind
    layers: tuple[str, ...]
    attentions: tuple[str, ...]


def quantized_units(model: QuantizedUNet, float_unet: nn.Module, structure: UNetStructure) -> list[QuantizedUnit]:
    """The units with anything quantized in them, in execution order, the Temporal Information Block first.

    That block is one unit whatever the method learns together: where its features are stored, the time embedding is gone,
    and no projection could be made float by itself.
    """

    def replaced(layer: str) -> bool:
        return type(model.unet.get_submodule(layer)) is not type(float_unet.get_submodule(layer))

    units: list[QuantizedUnit] = []
    for unit in TemporalAware()(structure, frozenset(structure.layers)):
        attentions = tuple(a for a in model.plan.operands if a == unit.name or a.startswith(f"{unit.name}."))
        if attentions or any(replaced(layer) for layer in unit.layers):
            units.append(QuantizedUnit(unit.name, unit.kind, unit.layers, attentions))
    return units


@contextmanager
def float_units(model: QuantizedUNet, float_unet: nn.Module, units: Collection[QuantizedUnit]) -> Generator[None]:
    """Make units float for the duration of a block.

    A quantized layer gets the float weight and its quantizers are off, but still run their hooks; a module in the place of
    a layer (a stored feature) is exchanged for the layer. No memory is taken: weights are those of `float_unet`.
    """
    attentions = [f"{name}.processor." for unit in units for name in unit.attentions]
    before = {layer: model.unet.get_submodule(layer) for unit in units for layer in unit.layers}
    weights = {layer: module.weight for layer, module in before.items() if isinstance(module, QuantLayer)}
    prefixes, named = tuple([f"{layer}." for layer in before] + attentions), model.unet.named_modules()
    quantizers = [module for name, module in named if isinstance(module, Quantizer) and name.startswith(prefixes)]
    try:
        for layer, module in before.items():
            original = float_unet.get_submodule(layer)
            if isinstance(module, QuantLayer):
                module.weight = nn.Parameter(original.get_parameter("weight"), requires_grad=False)
            else:
                model.unet.set_submodule(layer, original)
        with modes(quantizers, Mode.OFF):
            yield
    finally:
        for layer, module in before.items():
            if isinstance(module, QuantLayer):
                module.weight = weights[layer]
            else:
                model.unet.set_submodule(layer, module)

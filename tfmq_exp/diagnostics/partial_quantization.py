"""The quantized network with some of its parts as they are in the float one."""

from collections.abc import Collection, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from torch import nn

from tfmq_exp.denoisers.structure import Kind, UNetStructure
from tfmq_exp.quant.layers import QuantLayer
from tfmq_exp.quant.quantizers.base import Mode, Quantizer, modes
from tfmq_exp.reconstruction.units import TemporalAware
from tfmq_exp.surgery.quantized_unet import QuantizedUNet


@dataclass(frozen=True)
class QuantizedPart:
    """A unit of the network: its layers, and the attentions inside it whose operands are quantized."""

    name: str
    kind: Kind
    sites: tuple[str, ...]
    attentions: tuple[str, ...]


def quantized_parts(model: QuantizedUNet, float_unet: nn.Module, structure: UNetStructure) -> list[QuantizedPart]:
    """The units with something quantized in them, in execution order, the Temporal Information Block first.

    That block is one unit whatever the method learns together: where its features are stored, the time embedding is gone,
    and no projection could be made float by itself.
    """

    def replaced(site: str) -> bool:
        return type(model.unet.get_submodule(site)) is not type(float_unet.get_submodule(site))

    found: list[QuantizedPart] = []
    for unit in TemporalAware()(structure, frozenset(structure.sites)):
        inside = tuple(a for a in model.plan.operands if a == unit.name or a.startswith(f"{unit.name}."))
        if inside or any(replaced(site) for site in unit.sites):
            found.append(QuantizedPart(unit.name, unit.kind, unit.sites, inside))
    return found


@contextmanager
def made_float(
    model: QuantizedUNet, float_unet: nn.Module, sites: Collection[str], attentions: Collection[str] = ()
) -> Generator[None]:
    """Some layers, and the operands of some attentions, as the float network has them, for the duration of a block.

    A quantized layer takes the float weight and its quantizers are off, so that they can still be looked at; what stands
    for a layer (a stored feature) makes room for the layer. No memory is taken: weights are those of `float_unet`.
    """
    owners = tuple([f"{site}." for site in sites] + [f"{name}.processor." for name in attentions])
    named = model.unet.named_modules()
    quantizers = [module for name, module in named if isinstance(module, Quantizer) and name.startswith(owners)]
    before = {site: model.unet.get_submodule(site) for site in sites}
    weights = {site: layer.weight for site, layer in before.items() if isinstance(layer, QuantLayer)}
    try:
        for site, layer in before.items():
            original = float_unet.get_submodule(site)
            if isinstance(layer, QuantLayer):
                layer.weight = nn.Parameter(original.get_parameter("weight"), requires_grad=False)
            else:
                model.unet.set_submodule(site, original)
        with modes(quantizers, Mode.OFF):
            yield
    finally:
        for site, layer in before.items():
            if isinstance(layer, QuantLayer):
                layer.weight = weights[site]
            else:
                model.unet.set_submodule(site, layer)


@contextmanager
def all_float(model: QuantizedUNet, float_unet: nn.Module, parts: Sequence[QuantizedPart]) -> Generator[None]:
    """The same for whole units."""
    sites = [site for part in parts for site in part.sites]
    with made_float(model, float_unet, sites, [name for part in parts for name in part.attentions]):
        yield

"""The Temporal Information Block (TFMQ-DM, arXiv 2311.16503, section 4.1): all that depends on the timestep alone."""

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from tfmq_exp.denoisers.structure import Role, UNetStructure
from tfmq_exp.denoisers.unet import LAYERS, after_each, time_embedding


class TemporalInformationBlock(nn.Module):
    """t -> the temporal feature of every block: g_i(h(t)), with h the time embedding and g_i the i-th projection.

    A view: it calls the UNet's own layers and owns none, so it is bit-equal to the features inside the UNet, before and
    after quantization. Build it from the present network: it does not follow later replacements of layers.
    """

    def __init__(self, unet: nn.Module, structure: UNetStructure) -> None:
        super().__init__()
        self.names = tuple(site.name for site in structure.by_role(Role.TIME_PROJ))
        self.unet = unet

    def forward(self, t: Shaped[Tensor, "steps"]) -> tuple[Float[Tensor, "steps channels"], ...]:
        """One feature per block, in the network's order of registration; channel counts differ."""
        embedding = time_embedding(self.unet, t)
        return tuple(self.unet.get_submodule(name)(embedding) for name in self.names)


def measured_temporal_sites(unet: nn.Module, example: Mapping[str, Any], t: int, other_t: int) -> set[str]:
    """Layers that depend on t alone, by measurement: same output for inputs with noise, another output for another t."""
    layers = [name for name, module in unet.named_modules() if isinstance(module, LAYERS)]

    def run(inputs: Mapping[str, Any]) -> dict[str, Tensor]:
        outputs: dict[str, Tensor] = {}
        with after_each(unet, layers, lambda name, _module, _args, output: outputs.update({name: output})):
            unet(**inputs)
        return outputs

    generator = torch.Generator().manual_seed(0)
    moved = {
        key: value + torch.randn(value.shape, generator=generator).to(value)
        if isinstance(value, Tensor) and value.is_floating_point() and key != "timestep"
        else value
        for key, value in example.items()
    }
    now, later = ({"timestep": torch.full_like(example["timestep"], time)} for time in (t, other_t))
    first, other_inputs, other_time = run({**example, **now}), run({**moved, **now}), run({**example, **later})
    return {
        name
        for name, output in first.items()
        if torch.equal(output, other_inputs[name]) and not torch.equal(output, other_time[name])
    }

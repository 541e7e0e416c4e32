"""Models for tests of engines: a network wide enough for every kernel, with random parameters."""

from collections.abc import Mapping
from typing import Any

import torch
from diffusers import UNet2DModel
from torch import Tensor, nn

from tests.conftest import calibrated, generic, quantizable
from tfmq_exp.quant.layers import QuantizedWeight
from tfmq_exp.quant.scales.dynamic import DynamicConfig
from tfmq_exp.quant.spec import QParams, QuantSpec
from tfmq_exp.surgery.config import ScalePlan
from tfmq_exp.surgery.quantized_network import QuantizedNetwork

DYNAMIC = DynamicConfig("sample")
# choices of `model_of` that every engine has to know
CASES: dict[str, dict[str, Any]] = {
    "tables for all layers": {"scales": "all"},
    "eight bits": {"weight": 8, "scales": "all"},
    "bits chosen by step": {"activation": [4, 6, 8], "scales": "all"},
    "split": {"split": True, "scales": "all"},
    "ranges at run time": {"scales": ScalePlan(DYNAMIC, DYNAMIC)},
}


def small_unet() -> nn.Module:
    return generic(
        lambda: UNet2DModel(
            sample_size=8,
            block_out_channels=(32, 64),
            layers_per_block=1,
            down_block_types=("DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D"),
            norm_num_groups=8,
            attention_head_dim=16,
        )
    )


def one_level_unet(**fewer: Any) -> nn.Module:
    """Half the layers: shortcuts, attention and temporal layers, but nothing that changes the resolution.

    `fewer` are further settings of the network, for less of it.
    """
    settings: dict[str, Any] = {
        "sample_size": 8,
        "block_out_channels": (32,),
        "layers_per_block": 1,
        "down_block_types": ("AttnDownBlock2D",),
        "up_block_types": ("AttnUpBlock2D",),
        "norm_num_groups": 8,
        "attention_head_dim": 16,
    }
    return generic(lambda: UNet2DModel(**{**settings, **fewer}))


def model_of(network: nn.Module, **choices: Any) -> QuantizedNetwork:
    return calibrated(quantizable(network, **choices))


def inputs(*timesteps: int) -> Mapping[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    return {"sample": torch.randn(len(timesteps), 3, 8, 8, generator=generator), "timestep": torch.tensor(timesteps)}


def layer_inputs(model: QuantizedNetwork, given: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Inputs of every quantized layer in a forward pass of the simulation."""
    seen: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        return lambda _, args: seen.update({name: args[0]})

    hooks = [model.layer(name).register_forward_pre_hook(keep(name)) for name in model.plan.layers]
    with torch.no_grad():
        model(**given)
    for hook in hooks:
        hook.remove()
    return seen


def weight(bits: int, scheme: Any, zero_point: float, shape: tuple[int, ...] = (6, 4, 3, 3)) -> QuantizedWeight:
    """Integers with one zero point, codes at both ends of the grid included."""
    generator = torch.Generator().manual_seed(bits)
    spec = QuantSpec(bits, scheme, axis=0)
    codes = torch.randint(0, spec.levels, shape, generator=generator, dtype=torch.uint8)
    codes[0].view(-1)[:2] = torch.tensor([0, spec.levels - 1], dtype=torch.uint8)
    scale = torch.rand(spec.range_shape(shape), generator=generator) + 0.5
    return QuantizedWeight(codes, QParams(scale, torch.full_like(scale, zero_point)), spec)

"""Tiny networks of both families, and how the tests feed and quantize them."""

import tfmq_exp  # noqa: F401 - before diffusers, whose warnings about other packages it drops

# isort: split
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel, UNet2DModel
from torch import nn

from tests.helpers.sampling import SCHEDULE, SHAPE
from tfmq_exp.denoisers.denoiser import Denoiser
from tfmq_exp.denoisers.families.unet import attentions
from tfmq_exp.denoisers.read_structure import read_structure
from tfmq_exp.denoisers.structure import Role
from tfmq_exp.quant.observers import MinMax
from tfmq_exp.quant.quantizers import Mode
from tfmq_exp.quant.scales.observed_ranges import PerStepConfig, StaticConfig
from tfmq_exp.surgery.config import AttentionBits, Bits, LayerBits, QuantizationConfig, ScalePlan
from tfmq_exp.surgery.quantized_network import QuantizedNetwork, build_quantized_network
from tfmq_exp.surgery.resolve import resolve

torch.set_num_threads(1)

TIMESTEPS = (751, 501, 251, 1)


def generic(make: Callable[[], nn.Module]) -> nn.Module:
    """A network without special values: norms start as the identity, and would hide what they scale."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = make().eval().requires_grad_(False)
        for parameter in network.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.2 * torch.randn_like(parameter))
    return network


@pytest.fixture(scope="session")
def tiny_unet() -> nn.Module:
    return generic(
        lambda: UNet2DModel(
            sample_size=8,
            block_out_channels=(16, 32),
            layers_per_block=1,
            down_block_types=("DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D"),
            norm_num_groups=8,
            attention_head_dim=16,
        )
    )


@pytest.fixture(scope="session")
def tiny_conditional_unet() -> nn.Module:
    return generic(
        lambda: UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(16, 32),
            layers_per_block=1,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            norm_num_groups=8,
            attention_head_dim=2,
            cross_attention_dim=12,
        )
    )


@pytest.fixture
def denoiser(tiny_unet: nn.Module) -> Denoiser:
    """The tiny unconditional network with its noise schedule."""
    return Denoiser("tiny", tiny_unet, SHAPE, SCHEDULE, "0" * 64)


@pytest.fixture(scope="session", params=["tiny_unet", "tiny_conditional_unet"])
def network(request: pytest.FixtureRequest) -> nn.Module:
    """Every network family in turn. Shared by all tests: copy it before changing it."""
    return request.getfixturevalue(request.param)


def example_inputs(network: nn.Module, timesteps: Sequence[int] = (1,), seed: int = 0) -> dict[str, Any]:
    """Keyword arguments of a forward pass, one row for each timestep."""
    rows, generator = len(timesteps), torch.Generator().manual_seed(seed)
    inputs = {
        "sample": torch.randn(rows, network.config["in_channels"], 8, 8, generator=generator),
        "timestep": torch.tensor(timesteps),
    }
    if isinstance(network, UNet2DConditionModel):
        inputs["encoder_hidden_states"] = torch.randn(rows, 5, 12, generator=generator)
    return inputs


def calibrated(model: QuantizedNetwork, seed: int = 1) -> QuantizedNetwork:
    """Freeze every weight to the nearest integers, take activation ranges from random inputs, switch everything on."""
    model.calibrate_weights()
    for layer in model.weight_layers():
        model.freeze(layer)
    model.set_activations(Mode.OBSERVE)
    with torch.no_grad():
        model(**example_inputs(model.network, 2 * model.context.timesteps, seed))
    model.set_activations(Mode.QUANTIZE)
    return model


SCALES: dict[str, ScalePlan] = {
    "none": ScalePlan(StaticConfig(), StaticConfig()),
    "temporal": ScalePlan(PerStepConfig(), StaticConfig()),
    "all": ScalePlan(PerStepConfig(), PerStepConfig()),
}


def quantizable(
    network: nn.Module,
    *,
    weight: int | None = 4,
    activation: Bits | None = 8,
    output: Bits | None = None,
    scales: str | ScalePlan = "temporal",
    attention: AttentionBits | None = None,
    sites: dict[str, LayerBits] | None = None,
    split: bool = False,
    tie_qkv: bool = False,
) -> QuantizedNetwork:
    """A quantized twin with all quantizers still off; the same bits for every role. `scales` may name one of `SCALES`."""
    roles = {role.value: LayerBits(weight, activation, output) for role in Role}
    plan = QuantizationConfig(roles, attention or AttentionBits(), sites or {}, split_shortcuts=split, tie_qkv=tie_qkv)
    parts, chosen = (
        read_structure(network, example_inputs(network)),
        SCALES[scales] if isinstance(scales, str) else scales,
    )
    return build_quantized_network(
        network, resolve(plan, parts, tuple(attentions(network)), chosen, TIMESTEPS), MinMax()
    )

"""Tiny transformers of diffusers with random weights, and calibration sets for them."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from tests.conftest import generic
from tfmq_exp.calibration.dataset import CalibrationSet
from tfmq_exp.denoisers.denoiser import first_argument
from tfmq_exp.denoisers.loading.meta_network import parameters_on_meta
from tfmq_exp.denoisers.read_structure import read_structure
from tfmq_exp.denoisers.structure import NetworkStructure, Role
from tfmq_exp.quant.observers import MinMax
from tfmq_exp.quant.scales.observed_ranges import PerStepConfig, StaticConfig
from tfmq_exp.surgery.config import AttentionBits, LayerBits, QuantizationConfig, ScalePlan
from tfmq_exp.surgery.quantized_network import QuantizedNetwork, build_quantized_network
from tfmq_exp.surgery.resolve import resolve

TIMESTEPS = (751, 501, 251, 1)
TOKENS = 5  # of a text


@dataclass(frozen=True)
class Tiny:
    """A kind of network: its class, its configuration, the shape of a sample, and of its conditions' rows."""

    network: str
    config: Mapping[str, Any]
    sample: tuple[int, ...]
    conditions: Mapping[str, tuple[int, ...]]
    constants: Mapping[str, Any]

    def build(self) -> nn.Module:
        """The network, without special weights."""
        return generic(lambda: getattr(diffusers, self.network)(**self.config))

    def calibration(self, network: nn.Module, each: int = 6) -> CalibrationSet:
        """As many random samples of each timestep."""
        generator, count = torch.Generator().manual_seed(2), each * len(TIMESTEPS)
        number = {"class_labels": Tensor.long, "guidance": Tensor.float}
        given: dict[str, Tensor] = {
            name: torch.randn(count, *shape, generator=generator) if shape else number[name](torch.arange(count) % 3)
            for name, shape in self.conditions.items()
        }
        steps = torch.arange(len(TIMESTEPS)).repeat_interleave(each)
        x = torch.randn(count, *self.sample, generator=generator)
        columns = x, torch.tensor(TIMESTEPS).repeat_interleave(each), steps, torch.arange(count), given
        return CalibrationSet(*columns, constants=self.constants, first_argument=first_argument(network))


SMALL = {"num_attention_heads": 2, "attention_head_dim": 8}
IDS = torch.cartesian_prod(torch.zeros(1), torch.arange(4.0), torch.arange(4.0))
SIZE = {"in_channels": 4, "sample_size": 8, "patch_size": 2}
TEXT = {"encoder_hidden_states": (TOKENS, 16)}
TINY = {
    "dit": Tiny(
        "DiTTransformer2DModel",
        {**SMALL, **SIZE, "num_layers": 3, "norm_num_groups": 4, "num_embeds_ada_norm": 10, "norm_eps": 1e-6},
        (4, 8, 8),
        {"class_labels": ()},
        {},
    ),
    "pixart": Tiny(
        "PixArtTransformer2DModel",
        {
            **{**SMALL, **SIZE, "num_layers": 3, "norm_num_groups": 4, "cross_attention_dim": 16},
            **{"caption_channels": 16, "use_additional_conditions": False},
        },
        (4, 8, 8),
        TEXT,
        {"added_cond_kwargs.resolution": None, "added_cond_kwargs.aspect_ratio": None},
    ),
    "sd3": Tiny(
        "SD3Transformer2DModel",
        {
            **{**SMALL, **SIZE, "num_layers": 3, "joint_attention_dim": 16, "caption_projection_dim": 16},
            **{"pooled_projection_dim": 12, "out_channels": 4, "pos_embed_max_size": 8},
        },
        (4, 8, 8),
        {**TEXT, "pooled_projections": (12,)},
        {},
    ),
    "flux": Tiny(
        "FluxTransformer2DModel",
        {
            **{**SMALL, "attention_head_dim": 16, "in_channels": 16, "num_layers": 2, "num_single_layers": 2},
            **{"joint_attention_dim": 16, "pooled_projection_dim": 10, "axes_dims_rope": [4, 6, 6]},
        },
        (16, 16),
        {**TEXT, "pooled_projections": (10,)},
        {"img_ids": IDS, "txt_ids": torch.zeros(TOKENS, 3)},
    ),
    "flux2": Tiny(
        "Flux2Transformer2DModel",
        {
            **{**SMALL, "attention_head_dim": 16, "in_channels": 16, "num_layers": 2, "num_single_layers": 2},
            **{"joint_attention_dim": 16, "axes_dims_rope": [4, 4, 4, 4], "timestep_guidance_channels": 16},
        },
        (16, 16),
        {**TEXT, "guidance": ()},
        {"img_ids": torch.cat([IDS, IDS[:, :1]], 1), "txt_ids": torch.zeros(TOKENS, 4)},
    ),
}


def structure(network: nn.Module, data: CalibrationSet) -> NetworkStructure:
    return read_structure(network, data[slice(0, 1)].inputs(next(network.parameters()).device))


def quantized(
    network: nn.Module,
    parts: NetworkStructure,
    *,
    activation: int | None = None,
    timesteps: tuple[int, ...] = TIMESTEPS,
) -> QuantizedNetwork:
    """A copy with quantizers that are still off, 3-bit weights."""
    roles = {role.value: LayerBits(3, activation, None) for role in Role}
    plan = QuantizationConfig(roles, AttentionBits(), {})
    scales = ScalePlan(PerStepConfig(), StaticConfig())
    return build_quantized_network(network, resolve(plan, parts, (), scales, timesteps), MinMax())


def write_shards(network: nn.Module, folder: Path, count: int = 2) -> None:
    """Write the parameters in so many files, as diffusers names them."""
    named = list(network.named_parameters())
    for i in range(count):
        tensors = {name: parameter.detach().contiguous() for name, parameter in named[i::count]}
        save_file(tensors, folder / f"diffusion_pytorch_model-{i + 1:05}-of-{count:05}.safetensors")


def on_meta_device(tiny: Tiny) -> nn.Module:
    """The network with its parameters on the meta device."""
    with parameters_on_meta():
        return getattr(diffusers, tiny.network)(**tiny.config).requires_grad_(False).eval()

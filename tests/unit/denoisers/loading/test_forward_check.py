"""What is computed apart from a network's forward pass is what it is inside, whatever the settings; or the network is refused."""

import copy
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel, UNet2DModel
from torch import nn

from tests.conftest import example_inputs, generic, quantizable
from tfmq_exp.denoisers.denoiser import Conditions, DenoiserParts, NoConditions, Pixels, noise_of
from tfmq_exp.denoisers.loading.forward_check import check_forward, check_timesteps
from tfmq_exp.denoisers.read_structure import read_structure
from tfmq_exp.denoisers.structure import Role
from tfmq_exp.denoisers.temporal import TemporalInformationBlock, measured_temporal_layers
from tfmq_exp.surgery.config import AttentionBits

pytestmark = pytest.mark.bad_input

BASE: dict[str, Any] = {
    **{"sample_size": 8, "block_out_channels": (16, 32), "layers_per_block": 1, "norm_num_groups": 8},
    **{"in_channels": 3, "out_channels": 3},
}
PLAIN: dict[str, Any] = {
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    "attention_head_dim": 16,
}
TEXT: dict[str, Any] = {
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    **{"attention_head_dim": 2, "cross_attention_dim": 12},
}


def network(conditional: bool, **settings: Any) -> Any:
    if conditional:
        return generic(lambda: UNet2DConditionModel(**(BASE | TEXT | settings)))
    return generic(lambda: UNet2DModel(**(BASE | PLAIN | settings)))


class Words:
    """One row of five tokens."""

    def __call__(self, choices: Any) -> Conditions:
        raise NotImplementedError

    def example(self) -> Conditions:
        return Conditions({"encoder_hidden_states": torch.randn(1, 5, 12, generator=torch.Generator().manual_seed(0))})

    def to(self, device: torch.device) -> None:
        """Nowhere."""


def parts(unet: Any, last: int = 999) -> DenoiserParts:
    size = unet.config["sample_size"]
    height, width = (size, size) if isinstance(size, int) else size
    encoder = Words() if isinstance(unet, UNet2DConditionModel) else NoConditions()
    return DenoiserParts(unet, (3, height, width), {"num_train_timesteps": last + 1}, encoder, Pixels())


PLAIN_SETTINGS: list[dict[str, Any]] = [
    *({"act_fn": name} for name in ("swish", "mish", "gelu", "relu")),
    {"time_embedding_type": "fourier"},
    {"time_embedding_type": "learned", "num_train_timesteps": 1000},
    {"flip_sin_to_cos": False, "freq_shift": 1},
    {"time_embedding_dim": 24},
    {"resnet_time_scale_shift": "scale_shift"},
    {"downsample_type": "resnet", "upsample_type": "resnet"},
    {"center_input_sample": True, "downsample_padding": 0, "mid_block_scale_factor": 2.0},
    {"dropout": 0.3, "add_attention": False},
    {"mid_block_type": None},
    {"out_channels": 6},
    {"sample_size": (8, 6)},
    {"attention_head_dim": None},
]
TEXT_SETTINGS: list[dict[str, Any]] = [
    {"act_fn": "gelu"},
    {"time_embedding_type": "fourier"},
    {"time_embedding_act_fn": "gelu", "act_fn": "mish"},
    {"timestep_post_act": "mish", "time_embedding_dim": 20},
    {"resnet_skip_time_act": True, "resnet_out_scale_factor": 1.4},
    {"resnet_time_scale_shift": "scale_shift"},
    {"only_cross_attention": True},
    {"cross_attention_norm": "layer_norm"},
    {"cross_attention_norm": "group_norm"},
    {"use_linear_projection": True, "attention_head_dim": (4, 8)},
    {"conv_in_kernel": 1, "conv_out_kernel": 5},
    {"mid_block_type": "UNetMidBlock2D"},
    {"mid_block_type": None},
    {"transformer_layers_per_block": (1, 2)},
    {"sample_size": 7},
    {"sample_size": (5, 9)},
    {"out_channels": 6},
]
SETTINGS = [*((False, chosen) for chosen in PLAIN_SETTINGS), *((True, chosen) for chosen in TEXT_SETTINGS)]


@pytest.mark.parametrize(("conditional", "settings"), SETTINGS, ids=str)
def test_settings_that_are_the_networks(conditional: bool, settings: dict[str, Any]) -> None:
    """It passes; features computed from timesteps are those inside; a twin with all quantizers off gives the same noise."""
    unet = network(conditional, **settings)
    check_forward(parts(unet))
    inputs = example_inputs(unet, (751, 1))
    found = read_structure(unet, example_inputs(unet))
    assert measured_temporal_layers(unet, example_inputs(unet), 1, 2) == set(found.temporal_layers)
    features: dict[str, torch.Tensor] = {}
    handles = [
        unet.get_submodule(layer.name).register_forward_hook(
            lambda _m, _a, out, n=layer.name: features.update({n: out})
        )
        for layer in found.by_role(Role.TIME_PROJ)
    ]
    with torch.no_grad():
        wanted = unet(**inputs).sample
    for handle in handles:
        handle.remove()
    block = TemporalInformationBlock(unet, found)
    for name, feature in zip(block.names, block(inputs["timestep"]), strict=True):
        torch.testing.assert_close(feature, features[name], atol=1e-5, rtol=1e-5)
    twin = quantizable(unet, attention=AttentionBits(8, 8))
    with torch.no_grad():
        torch.testing.assert_close(twin(**inputs).sample, wanted, atol=1e-4, rtol=1e-4)
    assert noise_of(wanted, inputs["sample"]).shape == inputs["sample"].shape


@pytest.mark.parametrize(
    ("conditional", "settings", "message"),
    [
        (False, {"sample_size": 7}, "sample_size=7 is no multiple of 2"),
        (False, {"sample_size": (8, 5)}, r"sample_size=\(8, 5\) is no multiple of 2"),
        (False, {"in_channels": 6}, "in_channels=6, out_channels=3: more channels than the 3 of the noisy sample"),
        (False, {"out_channels": 4}, "in_channels=3, out_channels=4"),
        (True, {"in_channels": 9}, "in_channels=9"),
        (True, {"cross_attention_dim": 14}, "conditions of width 12: .*cross_attention_dim=14"),
        (True, {"dual_cross_attention": True}, "DualTransformer2DModel"),
        (True, {"time_cond_proj_dim": 8}, "no role is known for 1 layers .*cond_proj"),
        (False, {"time_embedding_type": "learned", "num_train_timesteps": 100}, "'learned'.*=100: .* timestep 999"),
    ],
    ids=str,
)
def test_settings_that_cannot_be_computed(conditional: bool, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_forward(parts(network(conditional, **settings)))


def test_a_feature_that_is_another_inside(tiny_unet: nn.Module) -> None:
    """An activation before the projections that is not the blocks'."""
    unet: Any = copy.deepcopy(tiny_unet)
    forward = unet.time_embedding.forward
    check_forward(parts(unet))
    calls: list[int] = []

    def other(*args: Any) -> torch.Tensor:
        if not args[0].is_meta:  # a pass of shapes alone
            calls.append(1)
        return forward(*args) * (1.1 if len(calls) == 1 else 1.0)

    unet.time_embedding.forward = other
    with pytest.raises(ValueError, match=r"default settings: 8 temporal features of UNet2DModel are not what they are"):
        check_forward(parts(unet))


def test_a_block_that_is_another_alone(tiny_unet: nn.Module) -> None:
    unet: Any = copy.deepcopy(tiny_unet)
    block = unet.mid_block.resnets[0]
    forward, calls = block.forward, []

    def other(*args: Any) -> torch.Tensor:
        calls.append(1)
        return forward(*args) + len(calls)

    block.forward = other
    with pytest.raises(ValueError, match=r"the block mid_block\.resnets\.0 .* run alone"):
        check_forward(parts(unet))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e38])
def test_numbers_that_are_not_finite(value: float, tiny_unet: nn.Module) -> None:
    unet: Any = copy.deepcopy(tiny_unet)
    unet.mid_block.resnets[0].conv1.weight.fill_(value)
    with pytest.raises(ValueError, match=r"not finite in one forward pass, first at mid_block\.resnets\.0"):
        check_forward(parts(unet))
    unet = copy.deepcopy(tiny_unet)
    unet.conv_out.bias[0] = value
    if value != 1e38:
        with pytest.raises(ValueError, match="first at its output"):
            check_forward(parts(unet))


def test_settings_that_give_no_numbers_are_named() -> None:
    with pytest.raises(ValueError, match=r"not finite in one forward pass, .*norm_eps=-1, mid_block_scale_factor=0\)"):
        check_forward(parts(network(False, norm_eps=-1, mid_block_scale_factor=0)))


def test_samples_without_a_first_stage_are_images() -> None:
    unet = network(False, in_channels=4, out_channels=4)
    with pytest.raises(ValueError, match="in_channels=4 without a first stage"):
        check_forward(parts(unet)._replace(sample_shape=(4, 8, 8)))


def test_timesteps_at_which_a_network_is_not_defined() -> None:
    fourier = network(False, time_embedding_type="fourier")
    check_timesteps(fourier, (999, 1))
    with pytest.raises(
        ValueError, match="time_embedding_type='fourier': the time embedding at timestep 0 is not finite"
    ):
        check_timesteps(fourier, (999, 500, 0))
    check_timesteps(network(True, time_embedding_type="fourier"), (999, 0))  # no logarithm there
    check_timesteps(network(False), (999, 0))


def test_a_network_of_learned_timesteps_has_none_between_whole_ones() -> None:
    learned = network(False, time_embedding_type="learned", num_train_timesteps=1000)
    check_timesteps(learned, (999, 0))
    with pytest.raises(ValueError, match=r"time_embedding_type=learned has embeddings of whole .* as 999\.5: choose"):
        check_timesteps(learned, (999.5, 0.5))
    check_timesteps(network(False), (999.25, 0.5))

"""Scales of input channels that cost nothing: the same network, whose layers read divided inputs."""

import copy
from typing import Any

import pytest
import torch
from diffusers import FluxTransformer2DModel, HunyuanDiT2DModel
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from tests.helpers.other_transformers import OTHERS, build, result
from tests.helpers.tiny_transformers import TINY
from tests.helpers.transformers import NAMES, cast, read_stored
from tfmq_exp.denoisers.denoiser import nested
from tfmq_exp.denoisers.families.inputs import InputGroup
from tfmq_exp.denoisers.input_groups import input_groups
from tfmq_exp.surgery.absorption import scale_inputs

# these compute norms or sums in single precision whatever the network's is
SINGLE = ("wan21", "sana", "hunyuan_dit")
Case = tuple[str, nn.Module, dict[str, Any]]


@pytest.fixture(params=[*NAMES, *OTHERS], scope="module")
def case(request: pytest.FixtureRequest) -> Case:
    """A network in double precision and its arguments."""
    name = request.param
    stored = read_stored(name) if name in NAMES else None
    network, arguments = (stored.network, stored.arguments) if stored else build(name)
    return name, nn.Module.to(copy.deepcopy(network), torch.float64), nested(cast(arguments, torch.float64))


def tolerance(name: str) -> float:
    return 2e-6 if name in SINGLE else 1e-12


def scales(groups: list[InputGroup]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(4)
    return [torch.randn(g.channels, generator=generator, dtype=torch.float64).exp() for g in groups]


def scaled(network: nn.Module, groups: list[InputGroup], *, online: bool) -> nn.Module:
    """A copy with random scales of these groups."""
    copied = copy.deepcopy(network)
    for group, scale in zip(groups, scales(groups), strict=True):
        scale_inputs(copied, group, scale, online=online)
    return copied


def inputs_of(network: nn.Module, groups: list[InputGroup], arguments: dict[str, Any]) -> dict[str, Tensor]:
    """What the layers of groups read."""
    found: dict[str, Tensor] = {}
    names = [name for group in groups for name in group.layers]

    def note(name: str) -> RemovableHandle:
        return network.get_submodule(name).register_forward_pre_hook(lambda _m, args: found.update({name: args[0]}))

    hooks = [note(name) for name in names]
    result(network, arguments)
    for hook in hooks:
        hook.remove()
    assert found.keys() == set(names)
    return found


def test_absorbed_and_online_scales_leave_the_network_as_it_is(case: Case) -> None:
    name, network, arguments = case
    groups = [group for group in input_groups(network) if group.rows]
    before, absorbed = result(network, arguments), result(scaled(network, groups, online=False), arguments)
    online = result(scaled(network, groups, online=True), arguments)
    assert (absorbed - online).abs().max() <= tolerance(name)
    assert (absorbed - before).abs().max() <= tolerance(name)
    assert (online - before).abs().max() <= 1e-12


def test_scales_come_in_any_order(case: Case) -> None:
    name, network, arguments = case
    groups = list(reversed(input_groups(network)))
    groups = [group for group in groups if not any("pooler" in layer for layer in group.layers)]
    changed, numbers = copy.deepcopy(network), scales(groups)
    for online in (True, False):  # those that are free come last, when other layers are divided already
        for group, scale in zip(groups, numbers, strict=True):
            if online != bool(group.rows):
                scale_inputs(changed, group, scale, online=online)
    error = (result(changed, arguments) - result(network, arguments)).abs().max()
    assert error <= tolerance(name)


def test_layers_read_divided_inputs_and_have_multiplied_weights(case: Case) -> None:
    name, network, arguments = case
    groups = [group for group in input_groups(network) if group.rows]
    changed = scaled(network, groups, online=False)
    before, after = inputs_of(network, groups, arguments), inputs_of(changed, groups, arguments)
    outputs = {rows.module: group for group in groups for rows in group.rows}  # whose rows were divided, too
    for group, scale in zip(groups, scales(groups), strict=True):
        for layer in group.layers:
            n, width = group.channels, before[layer].shape[-1]
            divisor = torch.cat([scale, scale.new_ones(width - n)])
            expected = before[layer] / divisor
            assert (after[layer] - expected).abs().max() <= tolerance(name) * expected.abs().max()
            if layer not in outputs:
                weights = [net.get_parameter(f"{layer}.weight") for net in (network, changed)]
                torch.testing.assert_close(weights[1], weights[0] * divisor, rtol=1e-12, atol=0)


def test_any_group_can_be_scaled_online(case: Case) -> None:
    name, network, arguments = case
    groups = [group for group in input_groups(network) if not any("pooler" in layer for layer in group.layers)]
    before, after = result(network, arguments), result(scaled(network, groups, online=True), arguments)
    assert (after - before).abs().max() <= tolerance(name)


def test_groups_are_a_partition_of_the_linear_layers(case: Case) -> None:
    _, network, _ = case
    names = [name for group in input_groups(network) for name in group.layers]
    assert sorted(names) == sorted(name for name, module in network.named_modules() if isinstance(module, nn.Linear))
    assert all(bool(group.rows) != bool(group.reason) for group in input_groups(network))


def test_layers_of_a_group_read_the_same_values(case: Case) -> None:
    _, network, arguments = case
    groups = [g for g in input_groups(network) if len(g.layers) > 1 and not g.layers[-1].endswith("to_add_out")]
    found = inputs_of(network, groups, arguments)
    for group in groups:
        assert all(torch.equal(found[name], found[group.layers[0]]) for name in group.layers)


def test_a_scale_of_one_changes_no_bit(case: Case) -> None:
    _, network, arguments = case
    for dtype in (torch.float64, torch.bfloat16):
        original = nn.Module.to(copy.deepcopy(network), dtype)
        copied = copy.deepcopy(original)
        for group in input_groups(copied):
            if group.rows:
                scale_inputs(copied, group, torch.ones(group.channels))
        own = dict(copied.named_parameters())
        assert all(torch.equal(value, own[name]) for name, value in original.named_parameters())
        assert not any(own[name].any() for name in own.keys() - dict(original.named_parameters()).keys())
        if dtype == torch.float64:
            assert torch.equal(result(copied, arguments), result(original, arguments))


def group_of(network: nn.Module, layer: str) -> InputGroup:
    return next(group for group in input_groups(network) if layer in group.layers)


NOT_FREE = [
    ("pixart_sigma", "transformer_blocks.0.attn1.to_v", "its shift and scale come from a layer that is not its own"),
    ("pixart_sigma", "transformer_blocks.0.ff.net.0.proj", "its shift and scale come from a layer that is not its own"),
    ("pixart_sigma", "transformer_blocks.1.attn2.to_q", "it reads the residual stream itself"),
    ("pixart_sigma", "transformer_blocks.1.attn2.to_k", "it reads a text that all blocks read"),
    ("dit", "transformer_blocks.0.ff.net.2", "its input comes from an activation"),
    ("dit", "transformer_blocks.1.norm1.linear", "it reads the embedding after its activation"),
    ("flux_dev", "context_embedder", "it is part of an embedder"),
    ("sd35", "time_text_embed.timestep_embedder.linear_2", "it is part of an embedder"),
    ("lumina2", "layers.0.attn.to_out.0", "several of its heads share one head of values"),
]


@pytest.mark.parametrize(("name", "layer", "reason"), NOT_FREE)
def test_what_is_not_free_is_refused_with_the_reason(name: str, layer: str, reason: str) -> None:
    network = copy.deepcopy(read_stored(name).network)
    group, before = group_of(network, layer), copy.deepcopy(network.state_dict())
    with pytest.raises(ValueError, match=rf"inputs of .*{layer}.* cannot be absorbed: {reason}.*; online=True divides"):
        scale_inputs(network, group, torch.ones(group.channels))
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())


def test_free_groups_are_those_of_the_specification() -> None:
    flux, single, block = TINY["flux"].build(), "single_transformer_blocks.1.", "transformer_blocks.0.attn."
    parallel = group_of(flux, f"{single}proj_mlp")
    assert set(parallel.layers) == {*(f"{single}attn.to_{part}" for part in "qkv"), f"{single}proj_mlp"}
    assert [(r.start, r.added) for r in parallel.rows] == [(0, 0), (32, 1)]
    assert group_of(flux, f"{single}proj_out").channels == 32  # of 32 + 128: attention comes first
    out = group_of(flux, f"{block}to_add_out")
    assert out.layers == (f"{block}to_out.0", f"{block}to_add_out")
    assert {rows.module for rows in out.rows} == {f"{block}to_v", f"{block}add_v_proj"}
    assert [(r.start, r.added) for r in group_of(flux, "proj_out").rows] == [(32, 0), (0, 1)]  # scale comes first
    video = group_of(build("cogvideox")[0], "transformer_blocks.0.ff.net.0.proj")
    assert [(r.start, r.added) for r in video.rows] == [(0, 0), (32, 1), (96, 0), (128, 1)]


def test_a_norm_without_parameters_makes_its_layers_not_free() -> None:
    _, config, _ = OTHERS["hunyuan_dit"]  # the shift alone cannot take a scale
    network = HunyuanDiT2DModel(**config)
    network.get_submodule("blocks.0.norm1").norm = nn.LayerNorm(16, elementwise_affine=False)
    assert not group_of(network, "blocks.0.attn1.to_q").rows
    assert group_of(network, "blocks.1.attn1.to_q").rows


def test_a_modulation_without_a_bias_gets_one() -> None:
    network, _ = build("auraflow")
    scale_inputs(network, group_of(network, "proj_out"), torch.full((16,), 4.0))
    bias = network.get_parameter("norm_out.linear.bias")
    assert bias.tolist() == [-0.75] * 16 + [0.0] * 16  # 1 / 4 - 1


@pytest.mark.parametrize(
    ("scale", "message"),
    [
        (torch.ones(15), r"need 16 scales, got shape \(15,\)"),
        (torch.ones(1, 16), r"need 16 scales, got shape \(1, 16\)"),
        (torch.tensor([1.0] * 15 + [0.0]), "must be positive and finite, got 0.0"),
        (torch.tensor([-2.0] + [1.0] * 15), "must be positive and finite, got -2.0"),
        (torch.tensor([float("nan")] + [1.0] * 15), "must be positive and finite, got nan"),
        (torch.tensor([float("inf")] + [1.0] * 15), "must be positive and finite, got inf"),
    ],
)
@pytest.mark.parametrize("online", [False, True])
def test_wrong_scales_are_named(scale: Tensor, message: str, online: bool) -> None:
    network = TINY["dit"].build()
    with pytest.raises(ValueError, match=rf"inputs of .*attn1.to_q.* {message}"):
        scale_inputs(network, group_of(network, "transformer_blocks.0.attn1.to_q"), scale, online=online)


def test_fused_projections_are_refused() -> None:
    network = TINY["flux"].build()
    assert isinstance(network, FluxTransformer2DModel)
    network.fuse_qkv_projections()
    with pytest.raises(ValueError, match=r"no role is known for .* layers of FluxTransformer2DModel, first .*to_.*qkv"):
        input_groups(network)


def test_a_layer_is_divided_once() -> None:
    network = TINY["dit"].build()
    group = group_of(network, "proj_out_2")
    scale_inputs(network, group, torch.ones(16), online=True)
    with pytest.raises(ValueError, match="proj_out_2 is a TransformedLinear, not a float linear layer"):
        scale_inputs(network, group, torch.ones(16))

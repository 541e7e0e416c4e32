"""What the anatomy says of a network agrees with what can be measured on it."""

import copy
import dataclasses
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.conftest import TIMESTEPS, calibrated, example_inputs, quantizable
from tfmq_exp.denoisers.read_structure import read_structure
from tfmq_exp.denoisers.structure import Kind, NetworkStructure, Role
from tfmq_exp.denoisers.temporal import TemporalInformationBlock, measured_temporal_layers
from tfmq_exp.reconstruction.units import Blockwise, TemporalAware

WEIGHTED = (nn.Linear, nn.modules.conv._ConvNd)


@pytest.fixture
def parts(network: nn.Module) -> NetworkStructure:
    return read_structure(network, example_inputs(network))


def executed_layers(network: nn.Module) -> list[str]:
    """Names of layers with weights in the order in which they first run."""
    order: list[str] = []
    handles = [
        module.register_forward_hook(lambda *_, name=name: order.append(name))
        for name, module in network.named_modules()
        if isinstance(module, WEIGHTED)
    ]
    network(**example_inputs(network))
    for handle in handles:
        handle.remove()
    return list(dict.fromkeys(order))


def test_layers_are_those_with_weights(network: nn.Module, parts: NetworkStructure) -> None:
    layers = {name for name, module in network.named_modules() if isinstance(module, WEIGHTED)}
    assert set(parts.layers) == layers
    assert all(layer.name == name for name, layer in parts.layers.items())
    weights = sum(parameter.numel() for parameter in network.parameters() if parameter.dim() > 1)
    assert sum(layer.weights for layer in parts.layers.values()) == weights


def test_every_layer_has_exactly_one_role(parts: NetworkStructure) -> None:
    counts = Counter(layer.name for role in Role for layer in parts.by_role(role))
    assert counts == dict.fromkeys(parts.layers, 1)


def test_stem_runs_first_and_head_last(network: nn.Module, parts: NetworkStructure) -> None:
    convolutions = [name for name in executed_layers(network) if isinstance(network.get_submodule(name), nn.Conv2d)]
    assert [layer.name for layer in parts.by_role(Role.STEM)] == convolutions[:1]
    assert [layer.name for layer in parts.by_role(Role.HEAD)] == convolutions[-1:]


def test_blocks_partition_the_layers(parts: NetworkStructure) -> None:
    assert Counter(layer for block in parts.blocks for layer in block.layers) == dict.fromkeys(parts.layers, 1)


def test_blocks_are_in_the_order_of_execution(network: nn.Module, parts: NetworkStructure) -> None:
    block_of = {layer: block.name for block in parts.blocks for layer in block.layers}
    order = list(dict.fromkeys(block_of[name] for name in executed_layers(network)))
    assert [block.name for block in parts.blocks] == order


def test_blocks_other_than_layers_are_what_papers_reconstruct(network: nn.Module, parts: NetworkStructure) -> None:
    expected = {
        "TimestepEmbedding": Kind.TEMPORAL,
        "ResnetBlock2D": Kind.RESIDUAL,
        "Attention": Kind.ATTENTION,
        "BasicTransformerBlock": Kind.ATTENTION,
        "Conv2d": Kind.LAYER,
    }
    assert all(block.kind is expected[type(network.get_submodule(block.name)).__name__] for block in parts.blocks)


@pytest.mark.parametrize("partition", [Blockwise(), TemporalAware()])
@pytest.mark.parametrize("stride", [1, 2, 3])
def test_units_are_disjoint_and_cover_what_can_be_learned(parts: NetworkStructure, partition: Any, stride: int) -> None:
    learnable = frozenset(list(parts.layers)[::stride])
    units = partition(parts, learnable)
    assert Counter(layer for unit in units for layer in unit.layers) == dict.fromkeys(learnable, 1)
    assert all(unit.layers for unit in units)


def inner_features(network: nn.Module, model: nn.Module, t: Tensor) -> list[Tensor]:
    """Outputs of every embedding projection while `model` runs."""
    features: list[Tensor] = []
    handles = [
        module.register_forward_hook(lambda _m, _a, out: features.append(out))
        for name, module in network.named_modules()
        if name.endswith("time_emb_proj")
    ]
    model(**example_inputs(network, t.tolist()))
    for handle in handles:
        handle.remove()
    return features


def sorted_features(features: Any) -> list[Any]:
    return sorted(feature.tolist() for feature in features)


def test_temporal_information_block_is_what_the_network_computes(network: nn.Module, parts: NetworkStructure) -> None:
    t = torch.tensor(TIMESTEPS)
    features = TemporalInformationBlock(network, parts)(t)
    assert sorted_features(features) == sorted_features(inner_features(network, network, t))
    assert all((feature[0] != feature[1]).any() for feature in features)


@pytest.mark.parametrize("per_step", ["none", "temporal"])
def test_temporal_information_block_follows_quantization(
    network: nn.Module, parts: NetworkStructure, per_step: str
) -> None:
    t, model = torch.tensor(TIMESTEPS), calibrated(quantizable(network, scales=per_step))
    with model.context.at(t):
        features = TemporalInformationBlock(model.network, parts)(t)
    assert sorted_features(features) == sorted_features(inner_features(model.network, model, t))
    assert sorted_features(features) != sorted_features(TemporalInformationBlock(network, parts)(t))


def test_temporal_layers_are_those_that_depend_on_time_alone(network: nn.Module, parts: NetworkStructure) -> None:
    measured = measured_temporal_layers(network, example_inputs(network), 1, 501)
    assert measured == set(parts.temporal_layers)
    assert len(measured) == 2 + sum(block.kind is Kind.RESIDUAL for block in parts.blocks)


def test_measurement_sees_a_temporal_layer_that_depends_on_the_image(
    network: nn.Module, parts: NetworkStructure
) -> None:
    leaky = copy.deepcopy(network)
    leak: list[Tensor] = []
    leaky.conv_in.register_forward_hook(lambda _m, _a, out: leak.append(out.mean()))
    name = parts.by_role(Role.TIME_PROJ)[-1].name
    leaky.get_submodule(name).register_forward_pre_hook(lambda _m, args: (args[0] + leak[-1],))
    assert set(parts.temporal_layers) - measured_temporal_layers(leaky, example_inputs(leaky), 1, 501) == {name}


def test_measurement_sees_a_wrong_role(network: nn.Module, parts: NetworkStructure) -> None:
    wrong = dataclasses.replace(parts.by_role(Role.SHORTCUT)[0], role=Role.TIME_PROJ)
    lie = dataclasses.replace(parts, layers={**parts.layers, wrong.name: wrong})
    assert set(lie.temporal_layers) - measured_temporal_layers(network, example_inputs(network), 1, 501) == {wrong.name}


def test_unknown_layer_is_named(network: nn.Module) -> None:
    extended = copy.deepcopy(network)
    extended.mid_block.novelty = nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"1 layers.*'mid_block\.novelty'"):
        read_structure(extended, example_inputs(extended))


def test_costs_by_hand(tiny_unet: nn.Module, tiny_conditional_unet: nn.Module) -> None:
    plain = read_structure(tiny_unet, example_inputs(tiny_unet)).layers
    conditional = read_structure(tiny_conditional_unet, example_inputs(tiny_conditional_unet)).layers
    assert plain["conv_in"].macs == (3 * 3 * 3) * 16 * (8 * 8)
    assert plain["down_blocks.0.downsamplers.0.conv"].macs == (16 * 3 * 3) * 16 * (4 * 4)
    assert plain["time_embedding.linear_1"].macs == 16 * 64
    assert plain["mid_block.attentions.0.to_q"].macs == 32 * 32 * (4 * 4)
    context_keys = "mid_block.attentions.0.transformer_blocks.0.attn2.to_k"
    assert conditional[context_keys].macs == 12 * 32 * 5

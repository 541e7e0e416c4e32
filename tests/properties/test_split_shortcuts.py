"""Shortcuts of the decoder, quantized in two halves."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from diffusers import UNet2DModel
from torch import Tensor, nn

from tests.conftest import TIMESTEPS, calibrated, example_inputs, quantizable
from tests.helpers.sampling import output
from tfmq_exp.denoisers.read_structure import read_structure
from tfmq_exp.denoisers.structure import NetworkStructure, Role
from tfmq_exp.quant.quantizers import SplitQuantizer


def parts_of(network: nn.Module) -> NetworkStructure:
    return read_structure(network, example_inputs(network))


@contextmanager
def joins(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[Tensor, int]]]:
    """Every result of joining two feature maps, and the channels of the first."""
    seen: list[tuple[Tensor, int]] = []
    cat = torch.cat

    def recording(tensors: Any, dim: int = 0) -> Tensor:
        joined = cat(tensors, dim)
        if dim == 1 and len(tensors) == 2 and joined.dim() == 4:
            seen.append((joined, tensors[0].shape[1]))
        return joined

    with monkeypatch.context() as patch:
        patch.setattr(torch, "cat", recording)
        yield seen


def test_split_is_where_trunk_and_skip_were_joined(network: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    parts, fed = parts_of(network), dict[str, Tensor]()
    handles = [
        network.get_submodule(layer.name).register_forward_pre_hook(
            lambda _m, args, name=layer.name: fed.__setitem__(name, args[0])
        )
        for layer in parts.by_role(Role.SHORTCUT)
    ]
    with joins(monkeypatch) as seen, torch.no_grad():
        network(**example_inputs(network))
    for handle in handles:
        handle.remove()
    trunk = {name: [size for joined, size in seen if joined is x] for name, x in fed.items()}
    assert {name: [parts.layers[name].split] if parts.layers[name].split else [] for name in fed} == trunk
    assert sum(bool(sizes) for sizes in trunk.values()) == sum(len(block.resnets) for block in network.up_blocks)
    assert all(layer.split is None for layer in parts.layers.values() if layer.name not in fed)


def test_without_a_middle_the_trunk_comes_from_the_encoder(tiny_unet: nn.Module) -> None:
    bare = UNet2DModel.from_config({**tiny_unet.config, "mid_block_type": None}).eval()
    parts = read_structure(bare, example_inputs(bare))
    first = parts.layers["up_blocks.0.resnets.0.conv_shortcut"]
    assert first.split == bare.down_blocks[-1].resnets[-1].out_channels


def test_only_shortcuts_of_the_decoder_are_split(network: nn.Module) -> None:
    model, parts = quantizable(network, split=True), parts_of(network)
    for name in parts.layers:
        layer, split = model.layer(name), parts.layers[name].split
        assert isinstance(layer.input_quantizer, SplitQuantizer) is (split is not None)
        assert isinstance(layer.weight_quantizer, SplitQuantizer) is (split is not None)
        assert len(layer.weight_parts()) == (2 if split else 1)
    assert not any(line.split for line in quantizable(network).plan.layers.values())


def test_halves_with_the_grids_of_the_whole_are_the_unsplit_network(network: nn.Module) -> None:
    whole, split = (calibrated(quantizable(network, split=split)) for split in (False, True))
    inputs, sources = example_inputs(network, TIMESTEPS, seed=5), whole.activation_quantizers()
    assert not torch.equal(output(split, inputs), output(whole, inputs))
    for name, quantizer in split.activation_quantizers().items():
        quantizer.load_state_dict(sources[name.split(".parts.")[0]].state_dict())
    for layer, line in split.plan.layers.items():
        if line.split:
            codes, grid, spec = whole.integers[layer][0]
            pieces = codes.split((line.split, codes.shape[1] - line.split), dim=1)
            split.freeze(layer, tuple(type(whole.integers[layer][0])(piece, grid, spec) for piece in pieces))
    assert torch.equal(output(split, inputs), output(whole, inputs))


def test_split_halves_are_nearer_to_the_weight(network: nn.Module) -> None:
    models = [calibrated(quantizable(network, split=split)) for split in (False, True)]
    for layer, line in models[1].plan.layers.items():
        if line.split:
            weight = network.get_submodule(layer).weight
            whole, halves = (float((m.layer(layer).weight - weight).square().sum()) for m in models)
            assert halves < whole

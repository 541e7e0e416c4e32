"""A Temporal Information Block that is too large to be learned at once: embedders first, then the layers of each block."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.helpers.reconstruction import MemoryCheckpointer
from tests.helpers.tiny_transformers import TINY, structure
from tests.properties.test_block_by_block import Stored, network, phase, recipe, same
from tfmq_exp.calibration.timesteps import EveryKth
from tfmq_exp.denoisers.structure import NetworkStructure
from tfmq_exp.denoisers.temporal import TemporalEmbedding, TemporalInformationBlock
from tfmq_exp.methods.weights import Reconstruct
from tfmq_exp.quant.quantizers import Mode, modes
from tfmq_exp.reconstruction import units
from tfmq_exp.reconstruction.temporal_inputs import temporal_inputs
from tfmq_exp.reconstruction.units import TemporalAware, Unit

pytestmark = pytest.mark.filterwarnings("ignore::Warning:pytorch_lightning")
NAME = "temporal_information_block"


def parts_of(name: str) -> NetworkStructure:
    return structure(network(name), TINY[name].calibration(network(name)))


def temporal(parts: NetworkStructure) -> list[Unit]:
    found = TemporalAware()(parts, frozenset(parts.layers))
    return [unit for unit in found if unit.driver == "timesteps"]


def size(parts: NetworkStructure, layers: Any) -> int:
    return sum(parts.layers[layer].weights for layer in layers)


@pytest.mark.parametrize("name", list(TINY))
def test_parts_are_the_embedders_and_the_layers_of_each_block(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = parts_of(name)
    (whole,) = temporal(parts)
    assert whole.name == NAME
    monkeypatch.setattr(units, "MOST_TEMPORAL", size(parts, whole.layers))
    assert [unit.layers for unit in temporal(parts)] == [whole.layers]
    monkeypatch.setattr(units, "MOST_TEMPORAL", size(parts, whole.layers) - 1)
    first, *others = temporal(parts)
    assert first.name == f"{NAME}.embedding"
    assert all("embedder" in layer or "time_embed" in layer for layer in first.layers)
    owners = {layer: block.name for block in parts.blocks for layer in block.layers}
    for unit in others:
        assert {f"{NAME}.{owners[layer]}" for layer in unit.layers} == {unit.name}
    assert sorted(layer for unit in (first, *others) for layer in unit.layers) == sorted(whole.layers)


@pytest.mark.parametrize("name", list(TINY))
@torch.no_grad()
def test_outputs_of_the_parts_are_features_and_what_their_layers_read(name: str) -> None:
    unet, parts, data = network(name), parts_of(name), TINY[name].calibration(network(name))
    t, given = torch.tensor([1, 251]), {key: value[:2] for key, value in data.conditions.items()}
    read: dict[str, torch.Tensor] = {}
    block = TemporalInformationBlock(unet, parts)
    hooks = [
        unet.get_submodule(layer).register_forward_pre_hook(lambda _, args, layer=layer: read.update({layer: args[0]}))
        for layer in block.names
    ]
    features = block.features(t, given)
    for hook in hooks:
        hook.remove()
    found = TemporalEmbedding(unet, parts)(t, given)
    assert all(any(torch.equal(x, own) for own in found) for x in read.values())
    assert (
        len(found) <= len({x.data_ptr() for x in read.values()}) + 1
    )  # PixArt's last layer reads the embedding as it is
    for layer in block.names:
        (own,) = TemporalInformationBlock(unet, parts, [layer])(t, given)
        assert torch.equal(own, features[layer])


def feature_error(model: Any, unet: nn.Module, parts: NetworkStructure, inputs: Any) -> float:
    t, (args, given), _ = inputs.whole[0], inputs.whole[1], inputs.whole[2]
    with torch.no_grad(), model.context.at(t):
        pairs = zip(
            TemporalInformationBlock(model.network, parts)(args, given),
            TemporalInformationBlock(unet, parts)(args, given),
            strict=True,
        )
        return sum(float((a - b).square().mean() / b.var()) for a, b in pairs)


def test_learned_parts_repair_the_features(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(units, "MOST_TEMPORAL", 0)
    context = phase("flux", network("flux"), MemoryCheckpointer())
    model, learning = context.model, recipe(iterations=150)
    inputs = temporal_inputs(context.float_network, context.data, model.context)
    model.calibrate_weights()
    with modes(model.weight_quantizers(), Mode.QUANTIZE):
        nearest = feature_error(model, context.float_network, context.structure, inputs)
    parts = temporal(context.structure)
    Reconstruct(lambda *_: parts, EveryKth(1), learning)(context)
    assert feature_error(model, context.float_network, context.structure, inputs) < 0.5 * nearest


@pytest.mark.parametrize("name", ["flux", "dit"])
def test_numbers_do_not_depend_on_where_the_weights_are(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(units, "MOST_TEMPORAL", 0)
    context = phase(name, network(name), MemoryCheckpointer())
    Reconstruct(TemporalAware(), EveryKth(1), recipe())(context)
    stored = Stored(name, tmp_path)
    first = stored.reconstruct(TemporalAware(), recipe(), interrupt=2)
    second = stored.reconstruct(TemporalAware(), recipe())
    assert [unit.split(".")[0] for unit in first.new] == [NAME] * 2
    assert second.restored == first.new
    assert same(stored.integers, context.model.integers)

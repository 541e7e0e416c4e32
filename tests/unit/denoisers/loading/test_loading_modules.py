"""Forward passes whose modules are loaded before they run: the whole network's bits, with a block's weights in memory."""

from collections.abc import Collection, Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from tests.helpers.tiny_transformers import TINY, on_meta_device, structure, write_shards
from tfmq_exp.denoisers.loading.loading_modules import called_within, loading_modules
from tfmq_exp.denoisers.loading.sharded_weights import ShardedWeights
from tfmq_exp.denoisers.temporal import TemporalInformationBlock

CPU = torch.device("cpu")


def loaded_bytes(network: nn.Module) -> int:
    return sum(parameter.nbytes for parameter in network.parameters() if not parameter.is_meta)


@pytest.mark.parametrize("name", list(TINY))
def test_outputs_are_those_of_the_whole_network_and_memory_is_that_of_a_block(name: str, tmp_path: Path) -> None:
    whole, empty, most = TINY[name].build(), on_meta_device(TINY[name]), 0
    write_shards(whole, tmp_path)
    shards, data = ShardedWeights.of(tmp_path), TINY[name].calibration(whole)
    largest = max(
        sum(p.nbytes for p in whole.get_submodule(b.name).parameters()) for b in structure(whole, data).blocks
    )

    def read(names: Collection[str]) -> Mapping[str, Tensor]:
        nonlocal most
        found = shards.read(names)
        most = max(most, loaded_bytes(empty) + sum(value.nbytes for value in found.values()))
        return found

    arguments = data[slice(0, 5)].inputs(CPU)
    call = called_within(empty, lambda: loading_modules(empty, read, CPU))
    with torch.no_grad():
        for _ in range(2):
            assert torch.equal(call(**arguments).sample, whole(**arguments).sample)
    own = sum(p.nbytes for p in whole.parameters(recurse=False))
    assert largest <= most <= 1.1 * largest + own  # a block's norms are in no layer
    assert loaded_bytes(empty) == 0
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in empty.modules())


@pytest.mark.parametrize("name", ["dit", "pixart", "flux"])
def test_layers_run_outside_of_their_blocks_too(name: str, tmp_path: Path) -> None:
    whole, empty = TINY[name].build(), on_meta_device(TINY[name])
    write_shards(whole, tmp_path)
    data, shards = TINY[name].calibration(whole), ShardedWeights.of(tmp_path)
    parts, given = structure(whole, data), {key: value[:3] for key, value in data.conditions.items()}
    t = torch.tensor([1, 251, 751])
    with torch.no_grad(), loading_modules(empty, shards.read, CPU):
        found = TemporalInformationBlock(empty, parts).features(t, given)
    expected = TemporalInformationBlock(whole, parts).features(t, given)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)


def test_an_error_on_the_way_frees_everything(tmp_path: Path) -> None:
    whole, empty = TINY["sd3"].build(), on_meta_device(TINY["sd3"])
    write_shards(whole, tmp_path)
    shards, broken = ShardedWeights.of(tmp_path), "transformer_blocks.1.attn.to_q.weight"
    del shards.files[broken]
    arguments = TINY["sd3"].calibration(whole)[slice(0, 2)].inputs(CPU)
    with pytest.raises(ValueError, match=f"lack {broken}"), loading_modules(empty, shards.read, CPU):
        empty(**arguments)
    assert loaded_bytes(empty) == 0

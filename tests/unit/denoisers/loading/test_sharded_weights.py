"""Weights read by name, and networks on the meta device."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from tests.helpers.tiny_transformers import TINY, on_meta_device, write_shards
from tfmq_exp.denoisers.loading.meta_network import loaded_part, on_meta, parameters_on_meta, skeleton
from tfmq_exp.denoisers.loading.sharded_weights import ShardedWeights, release_parameters, set_parameters


@pytest.fixture
def tensors() -> dict[str, torch.Tensor]:
    return {name: torch.randn(3, 2) for name in ("a.weight", "b.weight", "c.weight")}


def in_shards(folder: Path, tensors: dict[str, torch.Tensor], *, index: bool) -> None:
    files = dict(zip(tensors, ("-00001-of-00002", "-00002-of-00002", "-00002-of-00002"), strict=True))
    names = {name: f"diffusion_pytorch_model{part}.safetensors" for name, part in files.items()}
    for file in set(names.values()):
        save_file({name: x for name, x in tensors.items() if names[name] == file}, folder / file)
    if index:
        text = json.dumps({"metadata": {}, "weight_map": names})
        (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(text)


@pytest.mark.parametrize("layout", ["one file", "shards", "shards with an index"])
def test_tensors_are_those_of_the_files_whatever_their_layout(
    tensors: dict[str, torch.Tensor], layout: str, tmp_path: Path
) -> None:
    if layout == "one file":
        save_file(tensors, tmp_path / "diffusion_pytorch_model.safetensors")
    else:
        in_shards(tmp_path, tensors, index="index" in layout)
    shards = ShardedWeights.of(tmp_path)
    assert set(shards.files) == set(tensors)
    found = shards.read(["c.weight", "a.weight"])
    assert all(torch.equal(found[name], tensors[name]) for name in ("a.weight", "c.weight"))
    assert len(found) == 2
    shards.read(["a.weight"])
    assert shards.reads == {"a.weight": 2, "c.weight": 1}


@pytest.mark.bad_input
def test_missing_and_doubled_tensors_are_named(tensors: dict[str, torch.Tensor], tmp_path: Path) -> None:
    in_shards(tmp_path, tensors, index=False)
    with pytest.raises(ValueError, match=r"the weights lack d\.weight, 1 of 2"):
        ShardedWeights.of(tmp_path).read(["a.weight", "d.weight"])
    save_file(tensors, tmp_path / "diffusion_pytorch_model-00002-of-00002.safetensors")
    with pytest.raises(ValueError, match=r"a\.weight is in diffusion_pytorch_model-00001"):
        ShardedWeights.of(tmp_path)


@pytest.mark.bad_input
def test_other_and_damaged_files_are_refused(tensors: dict[str, torch.Tensor], tmp_path: Path) -> None:
    path = tmp_path / "diffusion_pytorch_model.safetensors"
    save_file(tensors, path)
    shards = ShardedWeights.of(tmp_path)
    path.write_bytes(path.read_bytes()[:60])
    with pytest.raises(ValueError, match="is truncated: it begins as safetensors"):
        shards.read(["a.weight"])
    with pytest.raises(ValueError, match="is truncated: it begins as safetensors"):
        ShardedWeights.of(tmp_path)
    path.rename(tmp_path / "diffusion_pytorch_model.bin")
    with pytest.raises(ValueError, match=r"from \.safetensors files alone"):
        ShardedWeights.of(tmp_path)


def test_parameters_are_set_in_the_networks_precision_and_released() -> None:
    with parameters_on_meta():
        net = nn.Sequential(nn.Linear(2, 3, bias=False), nn.BatchNorm1d(3))
    assert net[0].weight.is_meta
    assert not net[1].running_mean.is_meta  # type: ignore[union-attr]
    value = torch.randn(3, 2)
    set_parameters(net, {"0.weight": value.bfloat16()})
    assert torch.equal(net[0].weight, value.bfloat16().float())
    release_parameters(net, ["0.weight"])
    assert net[0].weight.is_meta
    with pytest.raises(ValueError, match=r"0\.weight has the shape \(2, 3\) in its file, expected \(3, 2\)"):
        set_parameters(net, {"0.weight": value.T})
    assert not nn.Linear(1, 1).weight.is_meta  # outside of the block, modules are built as ever


@pytest.mark.parametrize("name", sorted(TINY))
def test_network_built_on_the_meta_device_is_the_network(name: str, tmp_path: Path) -> None:
    """Its buffers are real and its parameters come from the files."""
    whole, built = TINY[name].build(), on_meta_device(TINY[name])
    write_shards(whole, tmp_path, 3)
    shards = ShardedWeights.of(tmp_path)
    set_parameters(built, shards.read(list(shards.files)))
    inputs = TINY[name].calibration(whole)[slice(0, 2)].inputs(torch.device("cpu"))
    with torch.no_grad():
        expected = whole(**inputs).sample
        assert torch.equal(built(**inputs).sample, expected)
        outline = skeleton(whole)(**on_meta(inputs)).sample
    assert outline.is_meta
    assert outline.shape == expected.shape


def test_loaded_part_shares_modules_and_has_nothing_else() -> None:
    with parameters_on_meta():
        net = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 4))
    set_parameters(net, {"0.weight": torch.ones(3, 2), "0.bias": torch.ones(3)})
    part = loaded_part(net, ["0"])
    assert part[0] is net[0]
    assert part[1] is not net[1]
    assert {name for name, _ in part.named_parameters()} == {"0.weight", "0.bias"}
    part.to(torch.float64)

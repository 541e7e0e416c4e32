"""Original DiT checkpoints give the outputs of the original program in the network of diffusers, and no others do."""

import copy
import gzip
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiTTransformer2DModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tests.helpers.transformers import GOLDENS, cast
from tfmq_exp.denoisers.originals.dit_checkpoint import empty_dit, load_dit, original_frequencies, published, read_dit
from tfmq_exp.denoisers.read_structure import read_structure
from tfmq_exp.denoisers.temporal import TemporalInformationBlock, temporal_pairs

FOLDER = GOLDENS / "dit"
CASES = ("b", "c")


def arguments(name: str) -> dict[str, Any]:
    return json.loads((FOLDER / "index.json").read_text(encoding="utf-8"))[name]["constructor"]


def state(name: str) -> dict[str, Tensor]:
    return cast(load_file(FOLDER / f"{name}.model.safetensors"), torch.float32)


def outputs(network: Any, recorded: dict[str, Tensor]) -> dict[str, Tensor]:
    dtype = next(network.parameters()).dtype
    given = {"out": ("x", "t"), "out_x_small": ("x_small", "t"), "out_t_fractional": ("x", "t_fractional")}
    with torch.no_grad():
        return {
            name: network(recorded[x].to(dtype), recorded[t], recorded["y"]).sample for name, (x, t) in given.items()
        }


@pytest.mark.parametrize("name", CASES)
def test_outputs_are_those_of_the_original(name: str) -> None:
    network, recorded = load_dit(arguments(name), state(name)), load_file(FOLDER / f"{name}.io.safetensors")
    for kind, ours in outputs(network, recorded).items():
        torch.testing.assert_close(ours, recorded[kind], atol=3e-5, rtol=0)
    for kind, ours in outputs(nn.Module.to(network, torch.float64), recorded).items():
        torch.testing.assert_close(ours, recorded[f"{kind}_f64"], atol=1e-12, rtol=0)


@pytest.mark.parametrize("name", CASES)
def test_features_are_those_of_the_original(name: str) -> None:
    network, recorded = load_dit(arguments(name), state(name)), load_file(FOLDER / f"{name}.io.safetensors")
    example = {"hidden_states": recorded["x"][:1], "timestep": recorded["t"][:1], "class_labels": recorded["y"][:1]}
    block = TemporalInformationBlock(network, read_structure(network, example))
    with torch.no_grad():
        features = block.features(*temporal_pairs(recorded["tib.t"], {"class_labels": recorded["tib.y"]}))
    places = {f"transformer_blocks.{i}.norm1.linear": f"blocks.{i}" for i in range(arguments(name)["depth"])}
    places["proj_out_1"] = "final_layer"
    assert features.keys() == places.keys()
    for layer, place in places.items():
        golden = recorded[f"tib.{place}.adaLN_modulation"]
        torch.testing.assert_close(features[layer].reshape(golden.shape), golden, atol=1e-5, rtol=0)


@pytest.mark.parametrize(("mended", "epsilon", "least"), [(False, 1e-6, 0.5), (False, 1e-5, 0.5), (True, 1e-5, 1e-6)])
def test_diffusers_own_network_is_another(mended: bool, epsilon: float, least: float) -> None:
    network, recorded = load_dit(arguments("b"), state("b")), load_file(FOLDER / "b.io.safetensors")
    kind: Any = DiTTransformer2DModel
    other = kind.from_config({**network.config, "norm_eps": epsilon}).eval()
    other.load_state_dict(network.state_dict())
    if mended:
        original_frequencies(other)
    with torch.no_grad():
        ours = outputs(nn.Module.to(other, torch.float64), recorded)["out"]
    assert (ours - recorded["out_f64"]).abs().max() > least


@pytest.mark.parametrize("name", json.loads(gzip.decompress((FOLDER / "fullsize_key_manifests.json.gz").read_bytes())))
def test_published_networks_have_a_place_for_every_parameter(name: str) -> None:
    manifest = json.loads(gzip.decompress((FOLDER / "fullsize_key_manifests.json.gz").read_bytes()))[name]
    size, pixels = name.split()
    keys = {key: torch.empty(shape, device="meta") for key, shape in manifest["keys"].items()}
    network = load_dit(published(size, int(pixels)), keys)
    copies = sum(p.numel() for block in network.transformer_blocks[1:] for p in block.norm1.emb.parameters())
    count = sum(parameter.numel() for parameter in network.parameters())
    assert count - copies + network.pos_embed.pos_embed.numel() == manifest["parameters"]


@pytest.mark.parametrize("kind", ["pt", "safetensors"])
def test_files_as_published(kind: str, tmp_path: Path) -> None:
    path, weights = tmp_path / f"DiT.{kind}", state("c")
    if kind == "pt":
        torch.save(weights, path)
    else:
        save_file(weights, path)
    expected = load_dit(arguments("c"), weights).state_dict()
    found = read_dit(path, arguments("c"))
    assert not found.training
    assert found.state_dict().keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in found.state_dict().items())
    assert torch.equal(found.pos_embed.pos_embed, weights["pos_embed"])


def damaged(kind: str) -> dict[str, Tensor]:
    weights = copy.copy(state("c"))
    if kind == "missing":
        del weights["blocks.1.mlp.fc2.bias"]
    elif kind == "unknown":
        weights["blocks.1.attn.q_norm.weight"] = torch.ones(8)
    elif kind == "shape":
        weights["blocks.0.attn.qkv.weight"] = weights["blocks.0.attn.qkv.weight"][:-1]
    elif kind == "table":
        weights["pos_embed"] = torch.zeros(1, 4, 24)
    elif kind == "learned table":
        weights["pos_embed"] = weights["pos_embed"] + 0.1
    elif kind == "blocks":
        weights = {name: value for name, value in weights.items() if not name.startswith("blocks.1.")}
    elif kind == "nan":
        weights["t_embedder.mlp.0.bias"] = torch.full_like(weights["t_embedder.mlp.0.bias"], torch.nan)
    return weights


@pytest.mark.parametrize(
    ("kind", "named"),
    [
        ("missing", r"1 missing, first transformer_blocks\.1\.ff\.net\.2\.bias"),
        ("unknown", r"1 not in the architecture, first blocks\.1\.attn\.q_norm\.weight"),
        ("shape", r"attn"),
        ("table", r"pos_embed must have shape \(1, 16, 24\), got \(1, 4, 24\)"),
        ("learned table", "pos_embed holds other numbers than the sines and cosines"),
        ("blocks", r"1 blocks instead of depth=2"),
        ("nan", r"timestep_embedder\.linear_1\.bias"),
    ],
)
def test_other_weights_are_refused(kind: str, named: str, tmp_path: Path) -> None:
    save_file({name: value.contiguous() for name, value in damaged(kind).items()}, tmp_path / "DiT.safetensors")
    with pytest.raises(ValueError, match=named) as error:
        read_dit(tmp_path / "DiT.safetensors", arguments("c"))
    assert str(tmp_path / "DiT.safetensors") in str(error.value)


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"width": 3}, "DiT has no argument 'width'; known: input_size"),
        ({"hidden_size": "24"}, "hidden_size must be a whole number, .*got '24'"),
        ({"num_heads": 5}, "hidden_size=24, num_heads=5, .* do not go together"),
        ({"mlp_ratio": 2.0}, "expected mlp_ratio=4.0"),
        ({"class_dropout_prob": 0.0}, "a row for no class"),
        ({"learn_sigma": 1}, "learn_sigma true or false"),
    ],
)
def test_wrong_arguments_are_named(changed: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        empty_dit({**arguments("c"), **changed})


@pytest.mark.parametrize(("name", "size"), [("DiT-M/2", 256), ("DiT-XL/3", 256), ("DiT-XL/2", 250)])
def test_unpublished_sizes_are_refused(name: str, size: int) -> None:
    with pytest.raises(ValueError, match=r"expected DiT-\{S, B, L, XL\}/\{2, 4, 8\} for images"):
        published(name, size)


def test_pickles_that_name_code_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "DiT.pt"
    path.write_bytes(pickle.dumps({"x": print}))
    with pytest.raises(ValueError, match=str(path)):
        read_dit(path, arguments("c"))

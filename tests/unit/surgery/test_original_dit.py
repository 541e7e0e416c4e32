"""Artefacts of original DiT networks, whose frequencies no configuration of diffusers says."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.helpers.transformers import GOLDENS, cast
from tfmq_exp.denoisers.originals.dit_checkpoint import has_original_frequencies, load_dit
from tfmq_exp.denoisers.read_structure import read_structure
from tfmq_exp.denoisers.structure import Role
from tfmq_exp.quant.observers import MinMax
from tfmq_exp.quant.scales.observed_ranges import StaticConfig
from tfmq_exp.surgery import serialization
from tfmq_exp.surgery.config import AttentionBits, LayerBits, QuantizationConfig, ScalePlan
from tfmq_exp.surgery.quantized_network import QuantizedNetwork, build_quantized_network
from tfmq_exp.surgery.resolve import resolve


def inputs(count: int) -> dict[str, Tensor]:
    recorded = load_file(GOLDENS / "dit/c.io.safetensors")
    names = {"hidden_states": "x", "timestep": "t", "class_labels": "y"}
    return {name: recorded[key][:count] for name, key in names.items()}


def quantized() -> tuple[Any, QuantizedNetwork]:
    """A network and its quantized copy, weights to nearest with 8 bits."""
    arguments = json.loads((GOLDENS / "dit/index.json").read_text(encoding="utf-8"))["c"]["constructor"]
    network = load_dit(arguments, cast(load_file(GOLDENS / "dit/c.model.safetensors"), torch.float32))
    config = QuantizationConfig({role.value: LayerBits(8, None) for role in Role}, AttentionBits())
    steps, scales = tuple(inputs(2)["timestep"].unique().tolist()), ScalePlan(StaticConfig(), StaticConfig())
    plan = resolve(config, read_structure(network, inputs(1)), (), scales, steps)
    model = build_quantized_network(network, plan, MinMax())
    model.calibrate_weights()
    for layer in model.weight_layers():
        model.freeze(layer)
    return network, model


def test_frequencies_are_in_the_artefact(tmp_path: Path) -> None:
    network, model = quantized()
    serialization.save(model, tmp_path / "model.safetensors")
    loaded = serialization.load(tmp_path / "model.safetensors")
    assert has_original_frequencies(loaded.network)
    with torch.no_grad():
        exact, before, after = (one(**inputs(2)).sample for one in (network, model, loaded))
    assert torch.equal(after, before)
    assert (after - exact).abs().max() < 0.1 * exact.std()  # other frequencies change far more


@pytest.mark.parametrize("value", ["diffusers", None, 3, ...])
def test_other_frequencies_are_refused_or_others(value: Any, tmp_path: Path) -> None:
    _, model = quantized()
    serialization.save(model, tmp_path / "model.safetensors")
    manifest, tensors = serialization.read(tmp_path / "model.safetensors")
    if value is ...:
        del manifest["frequencies"]
    else:
        manifest["frequencies"] = value
    text = json.dumps(manifest, sort_keys=True)
    header = {"format": serialization.FORMAT, "version": serialization.VERSION, "manifest": manifest}
    header["sha256"] = serialization.checksum(text, tensors)
    save_file(tensors, tmp_path / "other.safetensors", {"header": json.dumps(header, sort_keys=True)})
    if value is ...:
        assert not has_original_frequencies(serialization.load(tmp_path / "other.safetensors").network)
    else:
        with pytest.raises(ValueError, match="frequencies is"):
            serialization.load(tmp_path / "other.safetensors")
